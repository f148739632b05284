"""Fetching a publication, and whether it came back as it was sent."""
import tempfile
from pathlib import Path

from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

from timm_spinal.errors import UserError
from timm_spinal.training.results import WEIGHTS

from .package import check_package, check_same_weights, load_package
from .retry import Say, with_retries


def download(repo: str, commit: str, names: list[str], cache: Path, say: Say) -> Path:
    """Files of a commit, fetched into an empty cache; returns the folder that holds them under their names.

    Raises:
        UserError: One of them cannot be had.
    """
    def fetch(name: str) -> Path:
        return Path(with_retries(
            lambda: hf_hub_download(repo, name, revision=commit, cache_dir=cache), repo, say))

    found = [fetch(name) for name in names]
    return found[0].parents[len(Path(names[0]).parts) - 1]


def check_download(repo: str, commit: str, package: Path, say: Say) -> None:
    """Download a commit into an empty cache, load it, and compare it with the package byte by byte.

    Raises:
        UserError: Something differs.
    """
    names = sorted(str(p.relative_to(package)) for p in package.rglob('*') if p.is_file())
    with tempfile.TemporaryDirectory(prefix='timm_spinal_hub_') as cache:
        folder = download(repo, commit, names, Path(cache), say)
        for name in names:
            if (folder / name).read_bytes() != (package / name).read_bytes():
                raise UserError(f'{repo}: {name} came back from the Hub with other content than was sent; '
                                'publish again, and if it stays so, tell the Hub')
        check_package(folder, repo)
        check_same_weights(load_package(folder, repo), load_file(package / WEIGHTS), repo)
    say(f'{repo}: downloaded again, and identical')

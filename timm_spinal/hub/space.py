"""A Space of the Hugging Face Hub that shows a model: its folder, and sending it."""
import importlib.metadata
import shutil
import tempfile
from pathlib import Path
from typing import Any, Sequence

import yaml
from huggingface_hub import HfApi
from timm.models import parse_model_name

import timm_spinal
from timm_spinal.errors import UserError
from timm_spinal.files import write_error
from timm_spinal.training.results import CONFIG, WEIGHTS
from timm_spinal.version import ADDRESS

from .options import check_repo_name
from .retry import Say, with_retries

APP = '''"""Made by `timm-spinal demo --space`."""
from pathlib import Path

from timm_spinal.see.demo import build, serve

page = build([{model!r}], sorted(map(str, Path('examples').glob('*'))), {title!r})
if __name__ == '__main__':
    serve(page)
'''
GRADIO = '6.31.0'  # the version that a Space gets where none is installed here
_NOT_COPIED = ('__pycache__', '*.safetensors', '*.so', '*.pyd', '*.c')


def write_space(folder: Path, model: str, examples: Sequence[str] = ()) -> str:
    """Write ``app.py``, ``requirements.txt`` and ``README.md`` with its metadata, and ``examples``.

    Args:
        folder: Must not exist.
        model: ``hf-hub:OWNER/NAME`` or a name of timm, which the Space downloads; or a folder, which is copied into it.
        examples: Pictures that the page offers.

    Returns:
        The name by which the Space loads the model.

    Raises:
        UserError: The folder exists or cannot be written.
    """
    if folder.exists():
        raise UserError(f'--space {folder}: exists already; name a new folder')
    source = Path(model.removeprefix('local-dir:'))
    copied = source.is_dir()
    repo = model.partition(':')[2].partition('@')[0] if model.startswith('hf-hub:') else ''
    if repo:
        check_repo_name(repo)
    title = repo.rpartition('/')[2] or source.name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix='.space_') as temp:
            draft = Path(temp) / folder.name
            draft.mkdir()
            if copied:
                (draft / 'model').mkdir()
                for file in (CONFIG, WEIGHTS):
                    shutil.copyfile(source / file, draft / 'model' / file)
                model = 'local-dir:model'
            elif not parse_model_name(model)[0] and source.is_file():
                shutil.copyfile(source, draft / source.name)  # an ONNX file
                model = source.name
            (draft / 'app.py').write_text(APP.format(model=model, title=title), encoding='utf-8')
            (draft / 'requirements.txt').write_text('\n'.join(_requirements(draft)) + '\n', encoding='utf-8')
            (draft / 'README.md').write_text(_readme(title, repo), encoding='utf-8')
            for i, example in enumerate(examples):
                (draft / 'examples').mkdir(exist_ok=True)
                shutil.copyfile(example, draft / 'examples' / f'{i:02}{Path(example).suffix.lower()}')
            draft.rename(folder)
    except OSError as e:
        raise UserError(f'--space {folder}: cannot be written ({write_error(e)}); choose another folder') from e
    return model


def _requirements(folder: Path) -> list[str]:
    """What pip installs in the Space; the package itself is copied into it while no index has it."""
    if ADDRESS:
        return [f'timm-spinal[demo] @ {ADDRESS}' if '/' in ADDRESS else f'{ADDRESS}[demo]']
    shutil.copytree(Path(timm_spinal.__file__).parent, folder / 'timm_spinal',
                    ignore=shutil.ignore_patterns(*_NOT_COPIED))
    try:
        needed = importlib.metadata.requires('timm-spinal') or []
    except importlib.metadata.PackageNotFoundError:
        needed = ['timm', 'torch', 'torchvision', 'accelerate', 'matplotlib']
    return [line for line in needed if 'extra ==' not in line] + ['grad-cam']


def _readme(title: str, repo: str) -> str:
    try:
        gradio = importlib.metadata.version('gradio')
    except importlib.metadata.PackageNotFoundError:
        gradio = GRADIO
    metadata: dict[str, Any] = dict(
        title=title, sdk='gradio', sdk_version=gradio, app_file='app.py', tags=['timm', 'timm-spinal'],
        **(dict(models=[repo]) if repo else {}))
    shown = f'[{repo}](https://huggingface.co/{repo})' if repo else 'the model in the folder `model`'
    return (f'---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n\n# {title}\n\nThis Space shows '
            f'{shown}: upload a picture to see its classes, and where the model looked.\n')


def publish_space(space: str, model: str, private: bool, say: Say = print) -> str:
    """Make a Space, or renew one, that shows a published model; returns its address.

    Args:
        space: ``OWNER/NAME``.
        model: ``hf-hub:OWNER/NAME``.
        private: Make the Space private.
        say: Gets a line for each try that failed.

    Raises:
        UserError: The Hub refuses.
    """
    api = HfApi(library_name='timm_spinal')
    with tempfile.TemporaryDirectory(prefix='timm_spinal_hub_') as temp:
        folder = Path(temp) / 'space'
        write_space(folder, model)
        with_retries(lambda: api.create_repo(
            space, repo_type='space', space_sdk='gradio', private=private, exist_ok=True), space, say)
        with_retries(lambda: api.upload_folder(
            repo_id=space, repo_type='space', folder_path=folder, commit_message=f'Show {model}'), space, say)
    return f'{api.endpoint}/spaces/{space}'

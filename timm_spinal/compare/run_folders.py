"""Comparisons that lie on the disk, and comparisons made of run folders from anywhere."""
from pathlib import Path
from typing import Any

from timm_spinal.errors import UserError
from timm_spinal.training.parser import load_yaml
from timm_spinal.training.resume_checks import config_diff, diff_label, with_defaults
from timm_spinal.training.run_dir import FolderLock

from .runs import Comparison, read_comparison, read_result, write_comparison


def comparisons_in(
        folders: list[Path],
        output: Path,
        control: str = '',
        command: str = '',
) -> list[tuple[Path, Comparison]]:
    """The comparisons of some folders.

    Args:
        folders: Folders of comparisons, each of which stays on its own; or run folders of the trainer, which become
            one comparison. A variant of it is what the runs differ in beside the seed.
        output: Folder of a comparison of run folders.
        control: Another control than the one they have; for run folders the first variant when ''.
        command: Command line, for a comparison of run folders.

    Raises:
        UserError: A folder that is neither, both kinds together, or an unknown control.
    """
    found = [(folder, read_comparison(folder)) for folder in folders]
    runs = [folder for folder, comparison in found if comparison is None]
    if not runs:
        kept = [(folder, comparison) for folder, comparison in found if comparison is not None]
        for _, comparison in kept:
            comparison.control = _known_control(control or comparison.control, comparison.variants)
        return kept
    if len(runs) < len(found):
        raise UserError(f'--report: {runs[0]} is no comparison while others are; report on them one by one')
    for folder in runs:
        if not (folder / 'args.yaml').exists():
            raise UserError(f'{folder}: holds neither a comparison (compare.json) nor a run of the trainer (args.yaml)')
    comparison = _from_runs(runs, control, command)
    with FolderLock(output):
        write_comparison(output, comparison)
    return [(output, comparison)]


def _known_control(control: str, variants: list[str]) -> str:
    if control not in variants:
        raise UserError(f'--control {control}: is not compared; choose one of {", ".join(variants)}')
    return control


def _from_runs(folders: list[Path], control: str, command: str) -> Comparison:
    settings = [with_defaults(load_yaml(folder / 'args.yaml')) for folder in folders]
    names = config_diff(settings)
    by_variant: dict[str, dict[str, str]] = {}
    for folder, values in zip(folders, settings):
        seeds = by_variant.setdefault(diff_label(values, names), {})
        if str(values['seed']) in seeds:
            raise UserError(f'{folder}: has the settings and the seed of {seeds[str(values["seed"])]}; leave one out')
        seeds[str(values['seed'])] = str(folder)
    variants = list(by_variant)
    first: dict[str, Any] = next((r for r in (read_result(folder) for folder in folders) if r), {})
    return Comparison(
        'runs', command, variants, _known_control(control or variants[0], variants),
        sorted({int(s) for seeds in by_variant.values() for s in seeds}),
        data=dict(name=first.get('dataset', ''), train_size=first.get('train_size'),
                  validation_size=first.get('eval_size'), test_size=first.get('test_images'), split=''),
        folders=by_variant,
    )

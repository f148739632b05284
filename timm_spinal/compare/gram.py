"""How orthonormal the shared filters of trained models are, as a picture of their Gram matrices.

    timm-spinal gram output/train/with_penalty output/train/without --output gram.png

The picture has a row for each run and a column for each stage. It shows M M^T, where each shared filter of the stage is
a row of M; two bases are one matrix, as in the penalty. Orthonormal filters give the identity. The command also prints
the norm of the filters and the size of the cosines between them.
"""
from pathlib import Path
from typing import Any, NamedTuple, Sequence

import torch
from torch import nn

from timm_spinal.arguments import Parser
from timm_spinal.errors import UserError
from timm_spinal.evaluation.figures import new_figure, save_figure
from timm_spinal.training.config import ValidateConfig
from timm_spinal.training.model import create_model
from timm_spinal.training.parser import check_output_file
from timm_spinal.training.results import CONFIG, WEIGHTS


class Gram(NamedTuple):
    """The shared filters of one stage.

    Attributes:
        matrix: M M^T.
        norm: Mean norm of a filter.
        cosine: Root mean square of the cosines between different filters.
        greatest: Greatest size of such a cosine.
    """
    matrix: torch.Tensor
    norm: float
    cosine: float
    greatest: float


def shared_bases(model: Any) -> dict[str, nn.Parameter]:
    """The shared filters of a model by their names in it.

    Raises:
        UserError: It has none.
    """
    stages = model.shared_stages() if hasattr(model, 'shared_stages') else {}
    bases = {f'{name}.{basis}': getattr(stage, basis) for name, stage in stages.items() for basis in
             stage.basis_names()}
    if not bases:
        raise UserError(f'{type(model).__name__}: it has no shared filters; give a model such as resnet34_sb_s48u1d')
    return bases


@torch.no_grad()
def grams(model: Any) -> dict[str, Gram]:
    """Of each stage, the Gram matrix of its shared filters; of filters of two sizes, one for each size."""
    matrices: dict[str, list[torch.Tensor]] = {}
    for name, basis in shared_bases(model).items():
        matrices.setdefault(f'{name.rpartition(".")[0]}, {basis[0].numel()} numbers', []).append(
            basis.float().flatten(1))
    return {name: _gram(torch.cat(rows)) for name, rows in matrices.items()}


def _gram(rows: torch.Tensor) -> Gram:
    norms = rows.norm(dim=1)
    cosines = rows @ rows.T / (norms[:, None] * norms).clamp(min=1e-12)
    other = cosines[~torch.eye(len(rows), dtype=torch.bool)]
    if not len(other):
        other = torch.zeros(1)
    return Gram(rows @ rows.T, norms.mean().item(), other.square().mean().sqrt().item(), other.abs().max().item())


def draw_gram(path: Path, models: dict[str, Any]) -> None:
    """A row of matrices for each model, a column for each stage.

    Args:
        path: Picture to write.
        models: Models by their titles.

    Raises:
        UserError: A model has no shared filters.
    """
    by_title = {title: grams(model) for title, model in models.items()}
    columns = max(len(of_model) for of_model in by_title.values())
    figure = new_figure(1.2 + 2.6 * columns, 2.9 * len(by_title))
    grid = figure.subplots(len(by_title), columns, squeeze=False)
    for line, (title, of_model) in zip(grid, by_title.items()):
        for axes in line[len(of_model):]:
            axes.set_axis_off()
        for axes, (name, gram) in zip(line, of_model.items()):
            image = axes.imshow(gram.matrix.cpu().numpy(), cmap='RdBu_r', vmin=-1, vmax=1, interpolation='nearest')
            axes.set_title(f'{name.partition(",")[0]}: norm {gram.norm:.2f}, cosine {gram.cosine:.3f}', fontsize=9)
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(title)
    figure.colorbar(image, ax=grid.ravel().tolist(), shrink=0.7, label='entries of M M^T')
    save_figure(figure, path, dpi=80)


def read_model(folder: Path) -> nn.Module:
    """The model of a run folder with its best weights.

    Raises:
        UserError: The folder holds none.
    """
    if missing := [file for file in (CONFIG, WEIGHTS) if not (folder / file).is_file()]:
        raise UserError(f'{folder}: has no {missing[0]}; give the folder of a finished run')
    return create_model(ValidateConfig(model=f'local-dir:{folder}', pretrained=True), None)


def main(argv: Sequence[str] | None = None) -> int:
    """``timm-spinal gram``; returns the exit code.

    Raises:
        UserError: A folder without a model, or a model without shared filters.
    """
    parser = Parser('timm-spinal gram', __doc__)
    parser.add_argument('runs', nargs='+', metavar='RUN', help='folder of a run of a model with shared filters')
    parser.add_argument('--output', default='gram.png', metavar='PNG', help='the picture (default: gram.png)')
    args = parser.parse_args(argv)
    check_output_file(args.output, '--output', ('.png',))
    models = {_title(Path(run), args.runs): read_model(Path(run)) for run in args.runs}
    draw_gram(Path(args.output), models)
    print('| run | stage | filters | norm | cosine, rms | cosine, greatest |\n| --- | --- | --- | --- | --- | --- |')
    for title, model in models.items():
        for name, gram in grams(model).items():
            print(f'| {title} | {name} | {len(gram.matrix)} | {gram.norm:.3f} | {gram.cosine:.4f} | '
                  f'{gram.greatest:.4f} |')
    print(f'\npicture: {args.output}')
    return 0


def _title(run: Path, runs: Sequence[str]) -> str:
    """The folder's name, with that of its parent where another folder has it too, as seed-0 of two variants."""
    path = run.absolute()
    same = [other for other in runs if Path(other).absolute().name == path.name]
    return path.name if len(same) < 2 else f'{path.parent.name}/{path.name}'

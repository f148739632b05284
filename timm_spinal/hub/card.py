"""The model card of a source: metadata for the Hub and text, made from `card_template.md`."""
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import model_entrypoint

import timm_spinal
from timm_spinal.cost import Cost
from timm_spinal.evaluation.judgement import CONFUSION, WORST
from timm_spinal.models.convolutions import convolution_of
from timm_spinal.training.model import needs_registration
from timm_spinal.training.report import accuracy_text, epochs_done
from timm_spinal.training.task import CAPSULE_LOSSES
from timm_spinal.version import ADDRESS

from .card_check import TASK
from .licences import Licence, choose_licence
from .options import PublishOptions
from .papers import TIMM, Paper, papers_of
from .publication import Publication
from .recipe import base_model, command, dataset_name, hub_dataset, hub_page, started_from_weights
from .reference_runs import ModelResults, Table, result_rows, table
from .scores import Score, title

TEMPLATE = Path(__file__).with_name('card_template.md')
SMALL_NETS = ('spinal', 'vgg5', 'cifarcnn', 'capsnet')  # of our own; other backbones are timm's


def make_card(publication: Publication, options: PublishOptions, cost: Cost, name: str, load_name: str) -> str:
    """README.md of a publication.

    Args:
        publication: What is published.
        options: Licence, data set id and the runs beside it.
        cost: Of the model.
        name: Title: the repository's name, or that of packaged weights.
        load_name: What ``timm.create_model`` takes: 'hf-hub:' with the repository and its revision, the name of
            packaged weights, or a folder.

    Raises:
        UserError: No licence, or one that the Hub does not know; runs beside it that do not fit.
    """
    papers = papers_of(publication.architecture, publication.config['pretrained_cfg'].get('paper_ids'))
    classes = publication.config['num_classes']
    reference_runs = result_rows(publication, options.beside)
    data = options.dataset_name or dataset_name(publication.args)
    repo, _, revision = load_name.removeprefix('hf-hub:').partition('@')
    card = ModelCard.from_template(
        _metadata(publication, options, papers, name, data),
        template_path=str(TEMPLATE),
        name=name,
        load_name=load_name,
        summary=_summary(publication, data),
        awaits=options.card_only,
        install=install_line(ADDRESS),
        architecture=publication.architecture if publication.architecture in timm_spinal.list_models() else '',
        register='' if load_name == name else _register_line(publication.architecture),  # packaged names are known
        repo=repo if load_name.startswith('hf-hub:') and not options.head_only else '',
        revision=revision,
        pull_request=revision.removeprefix('refs/pr/') if revision.startswith('refs/pr/') else '',
        channels=cost.input_size[0],
        mode='L' if cost.input_size[0] == 1 else 'RGB',
        topk=min(5, classes),
        details=_details(publication, cost, papers),
        results=_results(publication, reference_runs, data, options.dtype),
        pictures=[(text, file) for file, text in (
            (CONFUSION, 'Classes and predictions'), (WORST, 'The images of greatest loss'))
            if file in publication.files and load_name.startswith('hf-hub:')],
        recipe=_recipe(publication, load_name.startswith('hf-hub:')),
        limits=(_limits(publication, options, reference_runs.rows)
                + _limits_in_transformers(cost.input_size[0], load_name)),
        citation='\n'.join(
            paper.bibtex for paper in (*papers, *_timm_if_used(publication.architecture)) if paper.bibtex),
    )
    return str(card).rstrip() + '\n'


def install_line(address: str) -> str:
    """How this package is installed, where ``address`` is what pip takes; '' while it is in no index."""
    return f'with `pip install {address}`' if address else 'from a clone of its source (`pip install .` there)'


def resolve_licence(publication: Publication, options: PublishOptions) -> Licence:
    """The licence that was asked for, else that of the weights which training started from.

    Raises:
        UserError: Neither is there, or it is one that the Hub does not take.
    """
    of_start = publication.config['pretrained_cfg'].get('license') if started_from_weights(publication.args) else None
    asked = Licence(options.licence, options.licence_name, options.licence_link)
    return choose_licence(asked, of_start, hub_page(publication.args))


def _metadata(
        publication: Publication,
        options: PublishOptions,
        papers: list[Paper],
        name: str,
        data: str,
) -> ModelCardData:
    arxiv = [f'arxiv:{paper.arxiv}' for paper in papers]
    dataset = options.dataset_id or hub_dataset(publication.args)
    results = [result for score in publication.scores for result in _eval_results(score, dataset, data)]
    licence = resolve_licence(publication, options)
    return ModelCardData(
        library_name='timm',
        pipeline_tag=TASK,
        license=licence.id,
        license_name=licence.name or None,
        license_link=licence.link or None,
        tags=['timm', 'timm-spinal', TASK, *(paper.tag for paper in papers if paper.tag), *arxiv],
        datasets=[dataset] if dataset else None,
        base_model=base_model(publication.args) or None,
        metrics=['accuracy'] if results else None,
        model_name=name.rpartition('/')[2],
        eval_results=results or None,
    )


def _eval_results(score: Score, dataset: str, data: str) -> list[EvalResult]:
    common: dict[str, Any] = dict(
        task_type=TASK, task_name='Image Classification', dataset_type=dataset or data or 'custom',
        dataset_name=data or dataset or 'custom', dataset_split=score.split)
    return [
        EvalResult(metric_type='accuracy', metric_name=title(name), metric_value=round(value / 100, 6), **common)
        for name, value in score.accuracies.items()
    ]


def _summary(publication: Publication, data: str) -> str:
    doc = (model_entrypoint(publication.architecture).__doc__ or '').strip().splitlines()
    trained = f'trained on {data} with' if data else 'made with'
    start = base_model(publication.args)
    origin = f', from the weights of [`{start}`]({hub_page(publication.args)})' if start else ''
    what = doc[0] if doc else 'An image classifier.'
    return f'This is `{publication.architecture}`, {trained} timm_spinal{origin}. {what}'


def _register_line(architecture: str) -> str:
    if not needs_registration(architecture):
        return ''
    backbone, _, head = architecture.rpartition('_')
    call = f"ensure_registered('{architecture}')"
    if head in timm_spinal.HEADS and convolution_of(backbone) is None:
        call = f"register_head_variant('{backbone}', '{head}')"
    return f'timm_spinal.{call}  # makes the name known to timm'


def _details(publication: Publication, cost: Cost, papers: list[Paper]) -> dict[str, Any]:
    prefixes = ('head_', 'sb_', *(f'{prefix}_' for prefix in timm_spinal.CONVOLUTIONS))
    kwargs = {k: v for k, v in publication.config.get('model_args', {}).items() if k.startswith(prefixes)}
    details = {
        'Parameters (M)': f'{cost.params / 1e6:.3g}',
        'GMACs': f'{cost.macs / 1e9:.3g} (convolutions and matrix products, torch.utils.flop_counter)',
        'Activations (M)': f'{cost.activations / 1e6:.3g}',
        'Image size': ' x '.join(map(str, cost.input_size)),
        'Classes': publication.config['num_classes'],
        'Options': ', '.join(f'`{k}={v}`' for k, v in kwargs.items()),
        'Papers': ', '.join(f'[arXiv {p.arxiv}](https://arxiv.org/abs/{p.arxiv})' for p in papers),
    }
    return {k: v for k, v in details.items() if v != ''}


def _score_line(score: Score, data: str) -> str:
    images = f', {score.images:,} images' if score.images else ''
    chosen = '; this split chose the epoch' if score.chosen_on else ''
    return f'- {data}, {score.split}{images}: {accuracy_text(score.accuracies)}{chosen}'


def _results(publication: Publication, reference_runs: Table, data: str, dtype: str) -> str:
    lines, rows = [_score_line(score, data) for score in publication.scores], reference_runs.rows
    if not lines:
        before = ['', 'The weights before they were rounded to float16 had:', '',
                  *(_score_line(score, data) for score in publication.before)] if publication.before else []
        return '\n'.join(['No accuracy of exactly these weights was measured.', *before])
    if len(rows) > 1 or any(len(row.values) > 1 for row in rows):
        rounded = ', before they were rounded to float16' if dtype == 'fp16' else ''
        lines += ['', 'The table has means and standard deviations over seeds, of the best weights of each '
                      f'run{rounded}. The published model is bold.', '', table(rows, reference_runs.metric, data)]
    if reference_runs.recipe:
        lines += ['', f'The recipes of these runs also differ in: {", ".join(reference_runs.recipe)}.']
    if rows and len(rows[0].values) > 1:
        lines += ['', _which_seed(publication, rows[0])]
    if len(rows) == 1:
        lines += ['', 'There is no run of another head, or of an MLP with as many parameters, to compare with.']
    return '\n'.join(lines)


def _which_seed(publication: Publication, row: ModelResults) -> str:
    """Whether the published run was picked out of several."""
    assert publication.args is not None
    seed, count = publication.args.seed, len(row.values)
    better = sum(value > row.choosing[seed] for value in row.choosing.values())
    rank = 'the best' if not better else f'number {better + 1}'
    return f'The published weights are those of seed {seed}, {rank} of the {count} on the split that chose the epoch.'


def _recipe(publication: Publication, on_hub: bool) -> str:
    if publication.args is None:
        return 'Not recorded: the weights were published without the run that made them.'
    result = publication.result
    lines = ['```', command(publication.args, result.get('processes', 1)), '```', '']
    versions = ', '.join(f'{k} {v}' for k, v in result.get('versions', {}).items())
    seconds = f', {result["seconds"]:.0f} s' if result.get('seconds') else ''
    lines.append(f'Seed {publication.args.seed}, {epochs_done(result)} epochs, {result.get("updates")} updates, '
                 f'{result.get("train_size"):,} training images, {result.get("hardware")}{seconds}. {versions}.')
    if on_hub:
        lines.append('All options are in `train_hparams.yaml`, the epochs in `summary.csv`.')
    return '\n'.join(lines)


def _limits(publication: Publication, options: PublishOptions, rows: list[ModelResults]) -> list[str]:
    pairs = any('exact' in score.accuracies for score in publication.scores)
    given = 'two' if pairs else 'one'
    limits = [f'It knows {publication.config["num_classes"]} classes, and it assigns {given} of them to every image.',
              'It was measured only on the data above, and only at this image size.']
    if publication.args is not None and publication.args.loss in CAPSULE_LOSSES:
        limits.append(f'It was trained with the {publication.args.loss} loss: its scores are lengths of capsules, and '
                      'their softmax is not a probability.')
    if publication.scores and all(score.chosen_on for score in publication.scores):
        limits.append('The epoch was chosen on the split that was measured, so the accuracy is too high by an unknown '
                      'amount.')
    if rows and len(rows[0].values) == 1:
        limits.append('There is only one seed, so the spread over seeds is not known.')
    if options.weights != 'best':
        limits.append(f'These are the {options.weights} weights of the last checkpoint, not those of the best epoch.')
    if options.head_only:
        limits.append('The file holds the head alone. `timm.create_model` fetches the weights of the backbone that its '
                      'metadata name and checks their hash; other programs, such as transformers, do not.')
    if options.dtype == 'fp16':
        limits.append('The weights are rounded to float16' + (
            '; the accuracies are those of the rounded weights.' if publication.scores else '.'))
    return limits


def _limits_in_transformers(channels: int, load_name: str) -> list[str]:
    if channels == 3 or not load_name.startswith('hf-hub:'):
        return []
    return [f"transformers' `pipeline` makes 3 channels of every image and so cannot be used with these weights, which "
            f'take {channels}; the lines above can.']


def _timm_if_used(architecture: str) -> tuple[Paper, ...]:
    return () if architecture.startswith(SMALL_NETS) else (TIMM,)

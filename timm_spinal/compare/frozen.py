"""Comparison of heads on a frozen backbone: features once, then every head with every seed."""
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models import safe_model_name

from timm_spinal.cost import count_macs, count_params
from timm_spinal.errors import UserError
from timm_spinal.training.distributed import new_accelerator, on_main_process
from timm_spinal.training.model import create_model
from timm_spinal.training.report import hardware
from timm_spinal.training.run_dir import FolderLock
from timm_spinal.training.splits import describe_splits

from .controls import (
    Variant,
    for_tokens,
    is_control,
    needs_feature_map,
    new_heads,
    parse_variants,
    reads_tokens,
    size_controls,
    slug,
)
from .cost import head_cost, latency_ms
from .features import Extracted, extract, feature_shapes
from .findings import count_text
from .fitted import FITTED, HELD_OUT, Point, settings_grid
from .head_experiment import FittedExperiment, HeadExperiment, channels, recipe_grid, run_experiments
from .options import FrozenConfig, as_train_config, check_frozen, parse_seeds
from .report import write_report
from .runs import Comparison, write_comparison
from .splits import Splits, open_splits
from .train_head import Features, Recipe
from .train_heads import HeadTask, check_batch


def compare_frozen(config: FrozenConfig, command: str) -> Path | None:
    """Compare heads on frozen features and write the report.

    Under several processes all of them make features; the main process trains the heads.

    Args:
        config: All options.
        command: The command line, for the report.

    Returns:
        Folder of the comparison, None on other processes than the main one.

    Raises:
        UserError: Anything a user can mend; one line.
    """
    check_frozen(config)
    seeds, variants = parse_seeds(config.seeds), parse_variants(config.heads)
    names = [variant.name for variant in variants]
    if config.control not in names:
        raise UserError(f'--control {config.control}: it is not one of the compared heads; choose one of '
                        f'{", ".join(names)}')
    if len({slug(name) for name in names}) < len(names):
        raise UserError('--heads: two of the heads would share one run folder; write the options of one of them '
                        'differently')
    accelerator = new_accelerator(config.mixed_precision)
    train_config = as_train_config(config)
    with accelerator.main_process_first():
        splits = open_splits(train_config, config.test_split_fraction, config.train_size)
        recipe = config.recipe(len(splits.train))
        recipes = recipe_grid(recipe, config.tune_lr, config.tune_weight_decay) if config.tune else []
        torch.manual_seed(config.seed)  # a backbone without weights is the same in every process and run
        model: Any = create_model(train_config, 0)
    accelerator.print(describe_splits(splits.named()), flush=True)
    if model.loaded_weights is not None:
        accelerator.print(f'weights {model.loaded_weights}', flush=True)
    grids = _grids(config, variants, splits)
    tokens = any(map(reads_tokens, variants))
    maps = any(needs_feature_map(variant) and not reads_tokens(variant) for variant in variants)
    shapes = feature_shapes(config, model, accelerator.device, maps, tokens)
    if len(shapes.get('map', ())) == 2:
        variants = [for_tokens(variant, getattr(model, 'num_prefix_tokens', 0)) for variant in variants]
    variants = _size_and_dry_run(variants, shapes, splits, (recipes or [recipe])[0], accelerator.device)
    output = Path(config.output or f'output/compare/{safe_model_name(config.backbone)}')
    lock = FolderLock(output)
    on_main_process(accelerator, lock.acquire)
    try:
        folder = Path(config.features) if config.features else output / 'features'
        extracted = extract(config, model, splits, folder, accelerator, maps, tokens)
        if not accelerator.is_main_process:
            return None
        comparison = Comparison(
            'frozen', command, names, config.control, seeds,
            sized_as={v.name: v.sized_as for v in variants if v.sized_as},
            data=_describe_data(extracted, splits),
            controls=[variant.name for variant in variants if is_control(variant)],
        )
        comparison.setting, backbone_ms = _describe(config, recipe, model, extracted, splits, accelerator.device)
        comparison.setting.update(_describe_fitted(grids))
        write_comparison(output, comparison)
        experiments = []
        for variant in variants:
            about = (config, variant, splits.num_classes, _data(extracted, variant, accelerator.device),
                     extracted.identity, output, recipe)
            grid = grids.get(variant.name)
            experiments.append(FittedExperiment(*about, grid=grid) if grid else HeadExperiment(*about))
        _train(config, experiments, comparison, recipes)
        for experiment in experiments:
            x = experiment.data['test'].x[0, :1]
            cost = head_cost(experiment.model().to(x.device), backbone_ms, x)
            comparison.costs[experiment.variant.name] = asdict(cost)
        write_comparison(output, comparison)
        write_report(output, comparison, config.per_class, config.calibration)
        return output
    finally:
        lock.release()


def _size_and_dry_run(
        variants: list[Variant],
        shapes: dict[str, tuple[int, ...]],
        splits: Splits,
        recipe: Recipe,
        device: torch.device,
) -> list[Variant]:
    """The variants with the widths of controls, after two updates of each on random numbers: features may take hours.

    Raises:
        UserError: A head, batch size or optimizer that cannot work.
    """
    batch = recipe.batch_size
    check_batch(len(splits.train), batch)
    widths = {kind: channels(shape) for kind, shape in shapes.items()}
    variants = size_controls(variants, widths['pooled'], splits.num_classes, widths.get('map', 0))
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(batch) % splits.num_classes
    data = {kind: Features(torch.randn(1, batch, *shape, generator=generator), labels).to(device)
            for kind, shape in shapes.items()}
    for variant in variants:
        if variant.head in FITTED:
            continue
        kind = 'map' if needs_feature_map(variant) else 'pooled'
        heads = partial(new_heads, variant, widths[kind], splits.num_classes)
        HeadTask(heads, [0], data[kind], data[kind], recipe).dry_run(variant.name)
    return variants


def _grids(config: FrozenConfig, variants: list[Variant], splits: Splits) -> dict[str, list[Point]]:
    """Settings to choose from, of each fitted control by its name."""
    labels = splits.train.labels
    assert labels is not None  # `open_splits` needs them too
    return {
        variant.name: settings_grid(
            variant.name, variant.head, variant.options,
            {key: getattr(config, f'{variant.head}_{key}') for key in FITTED[variant.head].grid}, labels)
        for variant in variants if variant.head in FITTED
    }


def _describe_fitted(grids: dict[str, list[Point]]) -> dict[str, str]:
    """A line of the report on the controls that are fitted."""
    if not grids:
        return {}
    counts = ', '.join(f'`{name}` {len(grid)}' for name, grid in grids.items())
    return {'Fitted controls': f'settings tried: {counts}; chosen on {100 * HELD_OUT:g} % of each class of the '
                               'training images, then fitted to all of them; no seed takes part, so every seed has '
                               'the same result'}


def _data(extracted: Extracted, variant: Variant, device: torch.device) -> dict[str, Features]:
    """The splits as a variant reads them."""
    if device.type == 'mps' and variant.head in FITTED:
        device = torch.device('cpu')  # MPS has no float64
    kind = '.map' if needs_feature_map(variant) else ''
    return {split: extracted.features[split + kind].to(device) for split in ('train', 'validation', 'test')}


def _train(
        config: FrozenConfig,
        experiments: list[HeadExperiment],
        comparison: Comparison,
        recipes: list[Recipe],
) -> None:
    """Tune where there is a grid, then train what is not finished."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(config.matmul_precision)
    try:
        for experiment in experiments:
            if recipes and not isinstance(experiment, FittedExperiment):
                comparison.tuned[experiment.variant.name] = experiment.tune(recipes)
        run_experiments(experiments, comparison.seeds)
    finally:
        torch.set_float32_matmul_precision(before)


def _describe_data(extracted: Extracted, splits: Splits) -> dict[str, Any]:
    sizes = {f'{split}_size': len(extracted.features[split].y) for split in ('train', 'validation', 'test')}
    skipped = sum(len(s) for s in (splits.train, splits.validation, splits.test)) - sum(sizes.values())
    note = splits.note + (f' {skipped} unreadable images are left out.' if skipped else '')
    return dict(name=splits.train.name, **sizes, num_classes=splits.num_classes, class_names=splits.class_names,
                split=note)


def _describe(
        config: FrozenConfig,
        recipe: Recipe,
        model: Any,
        extracted: Extracted,
        splits: Splits,
        device: torch.device,
) -> tuple[dict[str, Any], float]:
    """Lines of the report on backbone, features and training; and the backbone's milliseconds for one image."""
    image = torch.zeros(1, *extracted.input_size, device=device)
    backbone_ms = latency_ms(model, image)
    weights = config.pretrained_path or config.initial_checkpoint or ('pretrained' if config.pretrained else 'random')
    made, seconds = extracted.made, extracted.seconds
    speed = f', {made:,} images made in {seconds:.0f} s ({made / seconds:.0f} images/s)' if made else \
        ', taken from the cache'
    passes = f', {config.augment_passes} augmented passes' if config.augment_passes else ''
    mixed = extracted.identity['precision']
    precision = 'float32' if mixed == 'no' else f'mixed precision, {mixed}'
    return {
        'Backbone': f'{config.backbone} (weights: {weights}), frozen, {count_text(count_params(model))} parameters, '
                    f'{count_text(count_macs(model.eval(), image))} MACs, {backbone_ms:.1f} ms for one image',
        **({'Weights': str(model.loaded_weights)} if model.loaded_weights is not None else {}),
        'Features': f'{extracted.features["train"].x.shape[2]} numbers from images of '
                    f'{"x".join(map(str, extracted.input_size))}{passes}, in {precision}{speed}',
        'Heads': f'{recipe.epochs} epochs, batches of {recipe.batch_size}, {recipe.opt}, cosine schedule, label '
                 f'smoothing {recipe.smoothing:g}, float32 with products of precision {config.matmul_precision}' +
                 ('' if config.tune else f', lr {recipe.lr:g}, weight decay {recipe.weight_decay:g}'),
        'Hardware': hardware(device, 1),
    }, backbone_ms

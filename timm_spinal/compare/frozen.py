"""Comparison of heads on a frozen backbone: features once, then every head with every seed."""
import hashlib
import json
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import save_file
from timm.models import safe_model_name
from torch import nn

from timm_spinal.errors import UserError
from timm_spinal.training.files import write_atomically
from timm_spinal.training.model import create_model
from timm_spinal.training.report import hardware, versions, write_table, write_text

from .controls import Variant, count_params, new_head, new_heads, parse_variants, size_controls, slug, takes_map
from .cost import head_cost, latency_ms, macs
from .features import Extracted, extract
from .findings import count_text
from .options import FrozenConfig, as_train_config, check_frozen, parse_seeds
from .report import PREDICTIONS, write_report
from .runs import (
    ERROR,
    RESULT,
    SUMMARY,
    Comparison,
    read_json,
    run_folder,
    write_comparison,
    write_json,
)
from .splits import Splits, open_splits
from .train_group import Features, Recipe, Trained
from .train_heads import predict, train_heads
from .tune import choose, grid


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
        raise UserError(f'--control {config.control}: is not compared; choose one of {", ".join(names)}')
    if len({slug(name) for name in names}) < len(names):
        raise UserError('--heads: two of the names give the same folder; write their options in another way')
    recipes = grid(_recipe(config), config.tune_lr, config.tune_weight_decay) if config.tune else []
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    train_config = as_train_config(config)
    with accelerator.main_process_first():
        splits = open_splits(train_config, config.test_split_fraction, config.train_size)
        torch.manual_seed(config.seed)  # a backbone without weights is the same in every process and run
        model = create_model(train_config, 0)
    output = Path(config.output or f'output/compare/{safe_model_name(config.backbone)}')
    folder = Path(config.features) if config.features else output / 'features'
    maps = any(takes_map(variant) for variant in variants)
    found = extract(config, model, splits, folder, accelerator, maps)
    if not accelerator.is_main_process:
        return None

    widths = found.features['train'].x.shape[2], found.features['train.map'].x.shape[2] if maps else 0
    variants = size_controls(variants, widths[0], splits.num_classes, widths[1])
    comparison = Comparison(
        'frozen', command, names, config.control, seeds,
        sized_as={v.name: v.sized_as for v in variants if v.sized_as},
        data=_describe_data(found, splits),
    )
    comparison.setting, backbone_ms = _describe(config, model, found, splits, accelerator.device)
    write_comparison(output, comparison)
    torch.set_float32_matmul_precision(config.matmul_precision)
    for variant in variants:
        data = {split: found.features[f'{split}.map' if takes_map(variant) else split].to(accelerator.device)
                for split in ('train', 'validation', 'test')}
        bench = HeadBench(config, variant, splits.num_classes, data, found.identity, output)
        recipe, points = bench.tune(recipes) if recipes else (_recipe(config), [])
        if points:
            comparison.tuned[variant.name] = points
        bench.run(seeds, recipe)
        head = new_head(variant, bench.in_features, splits.num_classes).to(accelerator.device)
        comparison.costs[variant.name] = asdict(head_cost(head, backbone_ms, data['test'].x[0, :1]))
        write_comparison(output, comparison)
    write_report(output, comparison, config.per_class, config.calibration)
    return output


class HeadBench:
    """Trains one variant on cached features and keeps its run folders."""

    def __init__(
            self,
            config: FrozenConfig,
            variant: Variant,
            num_classes: int,
            data: dict[str, Features],
            identity: dict[str, Any],
            output: Path,
    ):
        self.config = config
        self.variant = variant
        self.num_classes = num_classes
        self.data = data
        self.output = output
        self.in_features = data['train'].x.shape[2]
        self.identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        """What a finished run must agree in to be kept."""
        return dict(
            features=self.identity, head=self.variant.head, options=self.variant.options, recipe=asdict(recipe),
            matmul_precision=self.config.matmul_precision)

    def train(self, recipe: Recipe, seeds: list[int]) -> list[Trained]:
        """Train the variant for some seeds."""
        heads = partial(new_heads, self.variant, self.in_features, self.num_classes)
        return train_heads(heads, seeds, self.data['train'], self.data['validation'], recipe)

    def tune(self, recipes: list[Recipe]) -> tuple[Recipe, list[dict[str, Any]]]:
        """Choose a recipe; a choice from the same grid on the same features is kept."""
        path = self.output / 'runs' / slug(self.variant.name) / 'tune.json'
        settings = dict(grid=[self.settings(recipe) for recipe in recipes], seeds=self.config.tune_seeds)
        kept = read_json(path)
        if kept and kept['settings'] == settings:
            points = kept['points']
            return recipes[[point['chosen'] for point in points].index(True)], points
        recipe, points = choose(self.variant.name, recipes, self.train, self.config.tune_seeds)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, dict(settings=settings, points=points))
        return recipe, points

    def run(self, seeds: list[int], recipe: Recipe) -> None:
        """Train the seeds that are not finished, read the test split once for each and write their folders."""
        settings = self.settings(recipe)
        folders = {seed: run_folder(self.output, self.variant.name, seed) for seed in seeds}
        kept = {s: f for s, f in folders.items() if (read_json(f / RESULT) or {}).get('settings') == settings}
        todo = [seed for seed in seeds if seed not in kept]
        start = time.perf_counter()
        for trained in self.train(recipe, todo) if todo else []:
            self._write(folders[trained.seed], trained, recipe, settings)
        seconds = f', {time.perf_counter() - start:.1f} s' if todo else ''
        already = f' ({len(kept)} were there already)' if kept else ''
        tops = [(read_json(folder / RESULT) or {}).get('test_top1') for folder in folders.values()]
        shown = ', '.join('failed' if top1 is None else f'{top1:.2f}' for top1 in tops)
        print(f'{self.variant.name}: test top-1 % {shown}{seconds}{already}', flush=True)

    def _write(self, folder: Path, trained: Trained, recipe: Recipe, settings: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (RESULT, ERROR, PREDICTIONS):
            (folder / name).unlink(missing_ok=True)
        write_table(folder / SUMMARY, trained.history)
        if trained.failure:
            write_text(folder / ERROR, trained.failure)
            return
        head = new_head(self.variant, self.in_features, self.num_classes)
        test = self.data['test']
        logits = predict(head, trained.state, test)
        confidence, prediction = logits.softmax(dim=1).max(dim=1)
        write_atomically(folder / PREDICTIONS, lambda p: save_file(dict(
            prediction=prediction.cpu(), confidence=confidence.cpu(), target=test.y.cpu()), p))
        write_json(folder / RESULT, dict(
            model=self.config.backbone, variant=self.variant.name, seed=trained.seed,
            top1=trained.best['top1'], loss=trained.best['loss'],
            test_top1=100. * float((prediction == test.y).double().mean()),
            test_loss=float(F.cross_entropy(logits.double(), test.y)),
            epoch=recipe.epochs, best_epoch=trained.best_epoch, seconds=trained.seconds, params=count_params(head),
            lr=recipe.lr, weight_decay=recipe.weight_decay, num_classes=self.num_classes,
            train_size=len(self.data['train'].y), eval_size=len(self.data['validation'].y), test_size=len(test.y),
            hardware=hardware(test.y.device, 1), versions=versions(), settings=settings,
        ))


def _recipe(config: FrozenConfig) -> Recipe:
    return Recipe(
        epochs=config.epochs, batch_size=config.head_batch_size, opt=config.opt, lr=config.lr,
        weight_decay=config.weight_decay, warmup_epochs=config.warmup_epochs, smoothing=config.smoothing)


def _describe_data(found: Extracted, splits: Splits) -> dict[str, Any]:
    sizes = {f'{split}_size': len(found.features[split].y) for split in ('train', 'validation', 'test')}
    skipped = sum(len(s) for s in (splits.train, splits.validation, splits.test)) - sum(sizes.values())
    note = splits.note + (f' {skipped} unreadable images are left out.' if skipped else '')
    return dict(name=splits.train.name, **sizes, num_classes=splits.num_classes, class_names=splits.class_names,
                split=note)


def _describe(
        config: FrozenConfig,
        model: nn.Module,
        found: Extracted,
        splits: Splits,
        device: torch.device,
) -> tuple[dict[str, Any], float]:
    """Lines of the report on backbone, features and training; and the backbone's milliseconds for one image."""
    image = torch.zeros(1, *found.input_size, device=device)
    backbone_ms = latency_ms(model, image)
    weights = config.pretrained_path or config.initial_checkpoint or ('pretrained' if config.pretrained else 'random')
    recipe = _recipe(config)
    speed = f', {found.made:,} images made in {found.seconds:.0f} s ({found.made / found.seconds:.0f} images/s)' \
        if found.made else ', taken from the cache'
    passes = f', {config.augment_passes} augmented passes' if config.augment_passes else ''
    return {
        'Backbone': f'{config.backbone} (weights: {weights}), frozen, {count_text(count_params(model))} parameters, '
                    f'{count_text(macs(model, image))} MACs, {backbone_ms:.1f} ms for one image',
        'Features': f'{found.features["train"].x.shape[2]} numbers from images of '
                    f'{"x".join(map(str, found.input_size))}{passes}{speed}',
        'Heads': f'{recipe.epochs} epochs, batches of {recipe.batch_size}, {recipe.opt}, cosine schedule, label '
                 f'smoothing {recipe.smoothing:g}, float32 products {config.matmul_precision}' +
                 ('' if config.tune else f', lr {recipe.lr:g}, weight decay {recipe.weight_decay:g}'),
        'Hardware': hardware(device, 1),
    }, backbone_ms

import json

import pytest

from timm_spinal.compare.report import write_report
from timm_spinal.compare.runs import Comparison, comparisons_in, read_run_results, write_comparison
from timm_spinal.errors import UserError
from timm_spinal.training.config import TrainConfig, to_yaml


def make_run(folder, top1, result=None, **options):
    folder.mkdir(parents=True)
    (folder / 'args.yaml').write_text(to_yaml(TrainConfig(**options)))
    written = dict(top1=top1, test_top1=top1 - 1, best_epoch=0, epoch=1, params=5, dataset='d', test_images=100)
    (folder / 'result.json').write_text(json.dumps({**written, **(result or {})}))
    return folder


def test_variants_are_what_runs_differ_in(tmp_path):
    folders = [make_run(tmp_path / f'{m}{lr}{s}', 90 + s, model=m, lr=lr, seed=s, output=str(s), workers=s)
               for m in ('resnet18', 'resnet18_spinal') for lr in (0.1, 0.2) for s in (0, 3)]
    (output, comparison), = comparisons_in(folders, tmp_path / 'out')
    assert output == tmp_path / 'out' and comparison.seeds == [0, 3]
    assert comparison.variants == [
        'resnet18, lr=0.1', 'resnet18, lr=0.2', 'resnet18_spinal, lr=0.1', 'resnet18_spinal, lr=0.2']
    assert comparison.control == 'resnet18, lr=0.1'
    rows = read_run_results(output, comparison)
    assert [(r.variant, r.seed, r.val_top1, r.test_top1) for r in rows[2:4]] == [
        ('resnet18, lr=0.2', 0, 90, 89), ('resnet18, lr=0.2', 3, 93, 92)]


@pytest.mark.parametrize('name, value', [
    ('mixed_precision', 'bf16'), ('early_stop_patience', 3), ('stop_epoch', 7), ('epochs', 7), ('eval_metric', 'loss'),
    ('val_interval', 2), ('batch_size', 7)])
def test_runs_of_another_precision_stopping_rule_or_metric_are_no_seeds_of_one(tmp_path, name, value):
    folders = [make_run(tmp_path / 'a', 90, seed=0), make_run(tmp_path / 'b', 91, seed=1, **{name: value})]
    (_, comparison), = comparisons_in(folders, tmp_path / 'out')
    before = 'no' if name == 'mixed_precision' else getattr(TrainConfig(), name)
    assert comparison.variants == [f'{name}={before}', f'{name}={value}']


def test_what_changes_no_result_makes_no_variant(tmp_path):
    others = dict(workers=9, checkpoint_steps=5, checkpoint_hist=4, log_interval=3, validation_batch_size=7,
                  pin_mem=True, output='x', experiment='y', mixed_precision='no', log_with=['wandb'])
    folders = [make_run(tmp_path / 'a', 90, seed=0), make_run(tmp_path / 'b', 91, seed=1, **others)]
    (_, comparison), = comparisons_in(folders, tmp_path / 'out')
    assert comparison.variants == ['resnet50'] and comparison.seeds == [0, 1]


def test_the_report_says_the_precision_that_runs_say(tmp_path):
    runs = [make_run(tmp_path / f'{p}{seed}', 90 + seed, seed=seed, mixed_precision=p, result=dict(mixed_precision=p))
            for p in ('no', 'bf16') for seed in (0, 1)]
    write_report(*comparisons_in(runs[:2], tmp_path / 'one')[0])
    text = (tmp_path / 'one' / 'report.md').read_text()
    assert '- Precision: float32.' in text and 'none of fewer than 3 seeds' in text
    write_report(*comparisons_in(runs, tmp_path / 'two')[0])
    text = (tmp_path / 'two' / 'report.md').read_text()
    assert '- Precision: float32 for `mixed_precision=no`.' in text
    assert '- Precision: mixed precision, bf16 for `mixed_precision=bf16`.' in text


def test_the_same_run_twice_is_refused(tmp_path):
    folders = [make_run(tmp_path / name, 90, model='resnet18', seed=1) for name in 'ab']
    with pytest.raises(UserError, match='b: has the settings and the seed of .*a; leave one out'):
        comparisons_in(folders, tmp_path / 'out')


def test_comparisons_stay_on_their_own(tmp_path):
    for name in 'ab':
        (tmp_path / name).mkdir()
        write_comparison(tmp_path / name, Comparison('frozen', name, ['linear', 'spinal'], 'linear', [0]))
    found = comparisons_in([tmp_path / 'a', tmp_path / 'b'], tmp_path / 'out', control='spinal')
    assert [(output.name, c.command, c.control) for output, c in found] == [('a', 'a', 'spinal'), ('b', 'b', 'spinal')]
    with pytest.raises(UserError, match='--control caps: it is not one of the compared variants; choose one of linear, '
                                        'spinal'):
        comparisons_in([tmp_path / 'a'], tmp_path / 'out', control='caps')
    run = make_run(tmp_path / 'run', 90)
    with pytest.raises(UserError, match='run is not a comparison, but another one is'):
        comparisons_in([tmp_path / 'a', run], tmp_path / 'out')


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match='contains neither a comparison'):
        comparisons_in([tmp_path], tmp_path / 'out')
    (tmp_path / 'compare.json').write_text('{')
    with pytest.raises(UserError, match='compare.json: cannot be read'):
        comparisons_in([tmp_path], tmp_path / 'out')

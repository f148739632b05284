import json

import pytest

from timm_spinal.compare.run_folders import comparisons_in
from timm_spinal.compare.runs import Comparison, read_rows, write_comparison
from timm_spinal.errors import UserError
from timm_spinal.training.config import TrainConfig, to_yaml


def make_run(folder, top1, **options):
    folder.mkdir(parents=True)
    (folder / 'args.yaml').write_text(to_yaml(TrainConfig(**options)))
    (folder / 'result.json').write_text(json.dumps(dict(
        top1=top1, test_top1=top1 - 1, best_epoch=0, epoch=1, params=5, dataset='d', test_images=100)))
    return folder


def test_variants_are_what_runs_differ_in(tmp_path):
    folders = [make_run(tmp_path / f'{m}{lr}{s}', 90 + s, model=m, lr=lr, seed=s, output=str(s), workers=s)
               for m in ('resnet18', 'resnet18_spinal') for lr in (0.1, 0.2) for s in (0, 3)]
    (output, comparison), = comparisons_in(folders, tmp_path / 'out')
    assert output == tmp_path / 'out' and comparison.seeds == [0, 3]
    assert comparison.variants == [
        'resnet18, lr=0.1', 'resnet18, lr=0.2', 'resnet18_spinal, lr=0.1', 'resnet18_spinal, lr=0.2']
    assert comparison.control == 'resnet18, lr=0.1'
    rows = read_rows(output, comparison)
    assert [(r.variant, r.seed, r.val_top1, r.test_top1) for r in rows[2:4]] == [
        ('resnet18, lr=0.2', 0, 90, 89), ('resnet18, lr=0.2', 3, 93, 92)]


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
    with pytest.raises(UserError, match='--control caps: is not compared; choose one of linear, spinal'):
        comparisons_in([tmp_path / 'a'], tmp_path / 'out', control='caps')
    run = make_run(tmp_path / 'run', 90)
    with pytest.raises(UserError, match='run is no comparison while others are'):
        comparisons_in([tmp_path / 'a', run], tmp_path / 'out')


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match='holds neither a comparison'):
        comparisons_in([tmp_path], tmp_path / 'out')
    (tmp_path / 'compare.json').write_text('{')
    with pytest.raises(UserError, match='compare.json: cannot be read'):
        comparisons_in([tmp_path], tmp_path / 'out')

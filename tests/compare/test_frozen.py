import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from timm_spinal.compare import head_experiment
from timm_spinal.compare.cli import main
from timm_spinal.compare.frozen import compare_frozen
from timm_spinal.compare.options import FrozenConfig
from timm_spinal.errors import UserError
from timm_spinal.layers import HEADS


def config(folder, **kwargs):
    return FrozenConfig(**{**dict(
        backbone='test_resnet', dataset='digits', img_size=32, workers=0, train_size=300,
        heads='linear,mlp,spinal:width=8', seeds='2', epochs=3, head_batch_size=50, output=str(folder), lr=0.01),
        **kwargs})


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp('compare')
    torch.manual_seed(0)
    assert main(['--backbone', 'test_resnet', '--dataset', 'digits', '--img-size', '32', '-j', '0', '--train-size',
                 '300', '--heads', 'linear,mlp,spinal:width=8', '--seeds', '2', '--epochs', '3', '--head-batch-size',
                 '50', '--lr', '0.01', '--output', str(folder), '--per-class', '--calibration', '--tune', '--tune-lr',
                 '0.01', '1e-9', '--tune-weight-decay', '0.01', '--tune-seeds', '1']) == 0
    return folder


def read_csv(path):
    with open(path, newline='') as f:
        return list(csv.DictReader(f))


def test_a_row_for_each_run(done):
    rows = read_csv(done / 'results.csv')
    names = ['linear', 'mlp=spinal:width=8', 'spinal:width=8']
    assert [(r['variant'], r['seed']) for r in rows] == [(n, s) for n in names for s in '01']
    assert all(r['status'] == 'done' and 10 < float(r['test_top1']) <= 100 for r in rows)


def test_test_accuracy_is_that_of_the_kept_predictions(done):
    for row in read_csv(done / 'results.csv'):
        kept = load_file(Path(row['folder']) / 'predictions.safetensors')
        assert len(kept['target']) == 359
        assert 100 * (kept['prediction'] == kept['target']).mean() == pytest.approx(float(row['test_top1']))


def test_the_best_epoch_is_chosen_on_validation(done):
    for row in read_csv(done / 'results.csv'):
        history = read_csv(Path(row['folder']) / 'summary.csv')
        tops = [float(h['eval_top1']) for h in history]
        assert len(tops) == 3 and tops.index(max(tops)) == int(row['best_epoch'])


def test_report_is_whole(done):
    text = (done / 'report.md').read_text()
    for part in ('## Found', '`linear`', 'timm-spinal compare --backbone test_resnet', '## Tuning', 'random',
                 '300 training', '359 test', 'Expected calibration error'):
        assert part in text
    for name in ('table.md', 'table.html', 'accuracy.png', 'curves.png', 'calibration.png', 'per_class.csv'):
        assert (done / name).stat().st_size > 100
    assert [r['class'] for r in read_csv(done / 'per_class.csv')] == [str(i) for i in range(10)]


def test_tuning_takes_the_learning_rate_that_learns(done):
    tuned = json.loads((done / 'compare.json').read_text())['tuned']
    for points in tuned.values():
        assert [p['lr'] for p in points] == [0.01, 1e-9] and [p['chosen'] for p in points] == [True, False]


def test_control_has_the_size_of_its_head(done):
    costs = json.loads((done / 'compare.json').read_text())['costs']
    ours, head = costs['mlp=spinal:width=8']['params'], costs['spinal:width=8']['params']
    assert abs(ours - head) / head < 0.2 and costs['linear']['params'] < head
    assert costs['linear']['params'] == 10 * (costs['linear']['macs'] // 10) + 10


def test_report_is_remade_from_the_folders(done):
    before = (done / 'table.md').read_text()
    (done / 'table.md').unlink()
    (done / 'report.md').unlink()
    assert main(['--report', str(done), '--control', 'spinal:width=8']) == 0
    assert 'difference to spinal:width=8' in (done / 'table.md').read_text()
    assert main(['--report', str(done)]) == 0
    assert (done / 'table.md').read_text() == before


def train_counter(monkeypatch):
    trained = []
    original = head_experiment.train_heads

    def count(tasks, *args, **kwargs):
        trained.extend(seed for task in tasks for seed in task.seeds)
        return original(tasks, *args, **kwargs)

    monkeypatch.setattr(head_experiment, 'train_heads', count)
    return trained


@pytest.mark.slow
def test_finished_runs_are_kept_until_a_setting_changes(tmp_path, monkeypatch):
    trained = train_counter(monkeypatch)
    torch.manual_seed(0)
    compare_frozen(config(tmp_path, heads='linear', seeds='2'), 'cmd')
    torch.manual_seed(0)
    compare_frozen(config(tmp_path, heads='linear', seeds='3'), 'cmd')
    assert trained == [0, 1, 2]
    torch.manual_seed(0)
    compare_frozen(config(tmp_path, heads='linear', seeds='3', lr=0.02), 'cmd')
    assert trained == [0, 1, 2, 0, 1, 2]


class MapHead(nn.Module):
    """A head that takes the feature map, as those of capsules."""
    needs_feature_map = True

    def __init__(self, in_features, num_classes, input_fmt='NCHW', device=None, dtype=None):
        super().__init__()
        self.fc = nn.Linear(4 * in_features, num_classes, device=device, dtype=dtype)

    def forward(self, x):
        return self.fc(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


@pytest.mark.slow
def test_a_head_that_needs_feature_maps_needs_no_word_here(tmp_path, monkeypatch):
    monkeypatch.setitem(HEADS, 'mapped', MapHead)
    compare_frozen(config(tmp_path, heads='linear,mapped', img_size=64), 'cmd')
    rows = read_csv(tmp_path / 'results.csv')
    assert [r['status'] for r in rows] == ['done'] * 4
    assert int(rows[2]['params']) == 4 * (int(rows[0]['params']) - 10) + 10


def test_controls_that_are_fitted_stand_beside_heads(tmp_path):
    compare_frozen(config(tmp_path, heads='linear,mlp,ridge,knn:k=5,logreg,spinal:width=8', seeds='3',
                          knn_temperature=[0.1]), 'cmd')
    rows = read_csv(tmp_path / 'results.csv')
    by_variant = {}
    for row in rows:
        by_variant.setdefault(row['variant'], []).append(row)
    assert list(by_variant) == ['linear', 'mlp=spinal:width=8', 'ridge', 'knn:k=5', 'logreg', 'spinal:width=8']
    for name in ('ridge', 'knn:k=5', 'logreg'):  # the result of every seed, as no seed takes part
        assert len({(row['test_top1'], row['val_top1'], row['chosen']) for row in by_variant[name]}) == 1
        assert len(by_variant[name]) == 3 and float(by_variant[name][0]['test_top1']) > 50
    assert by_variant['knn:k=5'][0]['chosen'] == 'k 5, temperature 0.1' and by_variant['knn:k=5'][0]['params'] == '0'
    assert by_variant['ridge'][0]['params'] == by_variant['linear'][0]['params']
    kept = load_file(Path(by_variant['ridge'][0]['folder']) / 'predictions.safetensors')
    assert 100 * (kept['prediction'] == kept['target']).mean() == pytest.approx(
        float(by_variant['ridge'][0]['test_top1']))
    tried = json.loads((Path(by_variant['ridge'][0]['folder']) / 'result.json').read_text())['tried']
    best = max(tried, key=lambda point: point['held_out_top1'])
    assert f'penalty {best["penalty"]:.3g}' == by_variant['ridge'][0]['chosen'] and len(tried) == 17

    tops = {name: sum(float(row['val_top1']) for row in of) for name, of in by_variant.items() if 'spinal:' not in name
            or '=' in name.split(':')[0]}
    strongest = max(tops, key=lambda name: tops[name])
    text, table = (tmp_path / 'report.md').read_text(), (tmp_path / 'table.md').read_text()
    assert f'The strongest control on the validation split is `{strongest}`' in text
    assert strongest == 'linear' or f'difference to {strongest} (interval)' in table
    assert 'settings tried: `ridge` 17, `knn:k=5` 1, `logreg` 13' in text


def test_fitted_controls_are_kept_until_a_setting_changes(tmp_path, monkeypatch):
    written = []
    original = head_experiment.FittedExperiment.fit
    monkeypatch.setattr(head_experiment.FittedExperiment, 'fit',
                        lambda self, seeds: written.append(seeds) or original(self, seeds))
    for changes in (dict(), dict(seeds='3'), dict(seeds='3', lr=0.1), dict(seeds='3', ridge_penalty=[0.5])):
        torch.manual_seed(0)
        compare_frozen(config(tmp_path, **{**dict(heads='linear,ridge', seeds='2', epochs=1), **changes}), 'cmd')
    assert written == [[0, 1], [2], [0, 1, 2]]  # the learning rate is none of its settings


@pytest.mark.slow
@pytest.mark.parametrize('backbone, heads, tokens', [
    ('test_resnet', 'linear,attn:queries=4,mldecoder:dim=16:mlp_dim=16,caps', None),
    ('test_vit', 'linear,attn:queries=4:prefix=keep,mldecoder:dim=16:mlp_dim=16', 1)])
def test_attention_heads_read_cached_maps_and_tokens(tmp_path, backbone, heads, tokens):
    compare_frozen(config(tmp_path, backbone=backbone, heads=heads, img_size=64), 'cmd')
    rows = read_csv(tmp_path / 'results.csv')
    assert [r['status'] for r in rows] == ['done'] * 2 * len(heads.split(','))
    options = json.loads((Path(rows[2]['folder']) / 'result.json').read_text())['settings']['options']
    assert options.get('num_prefix_tokens') == tokens and options.get('input_fmt') == ('NLC' if tokens else None)


@pytest.mark.slow
@pytest.mark.parametrize('options', [{}, dict(matmul_precision='medium')])
def test_products_have_the_precision_that_the_report_names(tmp_path, monkeypatch, options):
    seen = []

    class Spy(nn.Linear):
        needs_feature_map = False

        def forward(self, x):
            if self.training and len(x) == 50:
                seen.append(torch.get_float32_matmul_precision())
            return super().forward(x)

    monkeypatch.setitem(HEADS, 'spy', Spy)
    before = torch.get_float32_matmul_precision()
    compare_frozen(config(tmp_path, heads='linear,spy', seeds='1', **options), 'cmd')
    expected = options.get('matmul_precision', 'highest')
    assert seen[-18:] == [expected] * 18  # 3 epochs of 6 updates
    assert f'float32 with products of precision {expected}' in (tmp_path / 'report.md').read_text()
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.slow
def test_a_diverging_head_is_reported(tmp_path):
    compare_frozen(config(tmp_path, heads='linear,spinal:width=4', seeds='1', opt='sgd', lr=1e30, warmup_epochs=0), 'c')
    text = (tmp_path / 'report.md').read_text()
    assert 'runs are not in these numbers' in text and 'use a lower learning rate' in text


@pytest.mark.parametrize('changes, message', [
    (dict(control='spinal'), '--control spinal: it is not one of the compared heads'),
    (dict(heads='linear,spinal:splits=9'), 'head spinal:splits=9'),
    (dict(backbone='resnet999'), 'unknown model'),
    (dict(seeds='0'), 'empty list of seeds'),
    (dict(tune=True, tune_lr=[]), 'the grid is empty'),
    (dict(head_batch_size=999), 'use --head-batch-size 300 or less'),
    (dict(dataset='', data_dir='/nowhere'), 'does not exist'),
    (dict(opt='nosuch'), '--opt nosuch: '),
    (dict(heads='linear,spinal:dropout=7'), 'head spinal:dropout=7: '),
    (dict(heads='linear,spinal:dropout=a'), 'head spinal:dropout=a: '),
    (dict(heads='linear,spinal:width=0'), 'head spinal:width=0: '),
    (dict(heads='linear,spinal:norm_layer=3'), 'head spinal:norm_layer=3: '),
    (dict(heads='linear,caps:class_dim=-1'), 'head caps:class_dim=-1: '),
    (dict(heads='linear,xnodr:primary=nosuch', img_size=64), 'head xnodr:primary=nosuch: '),
    (dict(heads='linear,broken'), r'head broken: cannot be trained on features of \(96,\) in batches of 50 '),
    (dict(heads='linear,batchnorm', head_batch_size=1), 'head batchnorm: cannot be trained .*in batches of 1 '),
    (dict(backbone='test_vit', heads='linear,caps'), '--heads: one of the heads needs a feature map'),
    (dict(backbone='test_vit', heads='linear,attn,caps'), '--heads: one of the heads needs a feature map'),
    (dict(backbone='resmlp_12_224', img_size=224, heads='linear,caps'), 'but the backbone gives tokens'),
    (dict(heads='linear,ridge', ridge_penalty=[0.]), '--ridge-penalty: penalty must be a positive number'),
    (dict(heads='linear,knn:k=301'), r'--heads knn:k=301: k = 301 is above the number of images'),
    (dict(heads='linear,knn', knn_k=[5, 400]), r'--knn-k: k = 400 is above the number of images'),
    (dict(heads='linear,ridge:width=3'), "head ridge has no option 'width'; its options are penalty"),
    (dict(heads='linear,rigde'), "unknown head 'rigde'; did you mean ridge"),
    (dict(heads='linear,ridge,mlp=ridge'), 'mlp=ridge: ridge is not trained and has no size'),
])
def test_bad_input_is_refused_before_features_are_made(tmp_path, monkeypatch, changes, message):
    monkeypatch.setitem(HEADS, 'broken', BrokenHead)
    monkeypatch.setitem(HEADS, 'batchnorm', BatchNormHead)
    with pytest.raises(UserError, match=message) as error:
        compare_frozen(config(tmp_path / 'out', **changes), 'cmd')
    assert '\n' not in str(error.value) and list(tmp_path.iterdir()) == []


class BrokenHead(nn.Module):
    """Can be made, but not trained."""
    needs_feature_map = False

    def __init__(self, in_features, num_classes, device=None, dtype=None):
        super().__init__()
        self.fc = nn.Linear(in_features + 1, num_classes, device=device, dtype=dtype)

    def forward(self, x):
        return self.fc(x)


class BatchNormHead(BrokenHead):
    """Needs two images in training."""

    def __init__(self, in_features, num_classes, device=None, dtype=None):
        super().__init__(in_features - 1, num_classes, device, dtype)
        self.norm = nn.BatchNorm1d(in_features, device=device, dtype=dtype)

    def forward(self, x):
        return self.fc(self.norm(x))


@pytest.mark.slow
def test_features_may_lie_in_a_new_folder_elsewhere_or_in_the_output(tmp_path):
    for features, output in (('f/g', 'o/p'), ('same', 'same')):
        own = config(tmp_path / output, heads='linear', seeds='1', epochs=1, features=str(tmp_path / features))
        compare_frozen(own, 'cmd')
        assert (tmp_path / features / 'train-0-00000.safetensors').is_file()
        assert (tmp_path / output / 'report.md').is_file() and not (tmp_path / output / '.lock').exists()


def test_report_says_in_what_the_features_were_made(done, tmp_path):
    assert ', in float32' in (done / 'report.md').read_text()
    compare_frozen(config(tmp_path, heads='linear', seeds='1', epochs=1, mixed_precision='bf16'), 'cmd')
    text = (tmp_path / 'report.md').read_text()
    assert ', in mixed precision, bf16' in text and 'float32 with products of precision highest' in text

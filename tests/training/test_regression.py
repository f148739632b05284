"""Training on numbers: the data, the metrics by hand, a run, resume, refusals."""
import json

import numpy as np
import pytest
import timm
import torch

import timm_spinal  # noqa: F401
from timm_spinal.errors import UserError
from timm_spinal.training.config import TrainConfig
from timm_spinal.training.regression import FUNCTIONS, read_table, synthetic
from timm_spinal.training.train import train


def config(folder, **options) -> TrainConfig:
    defaults = dict(
        model='spinal_regression', dataset='regression/sum', loss='mse', batch_size=64, workers=0, epochs=3, opt='adam',
        lr=0.01, weight_decay=0., sched='constant', warmup_epochs=0, output=str(folder), experiment='run',
        log_interval=1000)
    return TrainConfig(**{**defaults, **options})


def test_data_of_the_script():
    x, y = synthetic('sum', 'train')
    assert x.shape == (1000, 8) and y.shape == (1000, 1)
    noise = y[:, 0] - x.sum(1)
    assert noise.min() >= -1e-5 and noise.max() <= 0.2 + 1e-5 and abs(noise.mean() - 0.1) < 0.01
    assert abs(x.mean()) < 0.05 and abs(x.std() - 1) < 0.05
    assert not torch.equal(x[:10], synthetic('sum', 'validation')[0][:10])
    for name in FUNCTIONS:  # the same inputs, whatever the function
        assert torch.equal(synthetic(name, 'train')[0], x)
    product = torch.prod(x, dim=1)
    torch.testing.assert_close(synthetic('sin_product', 'train')[1][:, 0] - noise, product.sin(), atol=1e-5, rtol=0)


@pytest.mark.parametrize('loss', ['mse', 'l1'])
def test_run_and_its_metrics_by_hand(tmp_path, loss):
    result = train(config(tmp_path, test_split='test', loss=loss))
    model = timm.create_model(f'local-dir:{tmp_path / "run"}', pretrained=True).eval()
    x, y = synthetic('sum', 'test')
    with torch.no_grad():
        error = (model(x[:, :, None, None]) - y).double()
    assert result['test_mse'] == pytest.approx(float(error.square().mean()), rel=1e-4)
    assert result['test_r2'] == pytest.approx(100 * (1 - float(error.square().mean()) / float(y.double().var(
        correction=0))), abs=1e-2)
    expected = error.abs().mean() if loss == 'l1' else error.square().mean()
    assert result['test_loss'] == pytest.approx(float(expected), rel=1e-4)
    assert result['r2'] > 90 and result['best_metric'] == 'r2' and result['params'] == 14_301
    assert result['test_images'] == 10_000 and (tmp_path / 'run' / 'curves.png').exists()


def test_resume_is_exact(tmp_path):
    train(config(tmp_path, experiment='whole'))
    train(config(tmp_path, experiment='parts', stop_epoch=1))
    train(config(tmp_path, experiment='parts', resume='auto'))
    one, other = (timm.create_model(f'local-dir:{tmp_path / name}', pretrained=True) for name in ('whole', 'parts'))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))


def test_mse_may_choose_the_epoch(tmp_path):
    result = train(config(tmp_path, eval_metric='mse', model='spinal_regression_plain'))
    rows = (tmp_path / 'run' / 'summary.csv').read_text().splitlines()
    column = rows[0].split(',').index('eval_mse')
    assert result['mse'] == pytest.approx(min(float(row.split(',')[column]) for row in rows[1:]))
    assert result['params'] == 22_001


def test_a_table(tmp_path):
    numbers = np.random.default_rng(0).normal(size=(60, 3))
    table = tmp_path / 'numbers.csv'
    table.write_text('a,b,y\n' + ''.join(f'{a},{b},{2 * a - b}\n' for a, b, _ in numbers))
    x, y = read_table(table)
    torch.testing.assert_close(2 * x[:, :1] - x[:, 1:], y)
    result = train(config(tmp_path, dataset='regression', data_dir=str(table), batch_size=8, epochs=20))
    assert (result['train_size'], result['eval_size'], result['inputs']) == (48, 12, 2) and result['r2'] > 90
    assert json.loads((tmp_path / 'run' / 'config.json').read_text())['pretrained_cfg']['input_size'] == [2, 1, 1]


@pytest.mark.parametrize('options, message', [
    (dict(dataset='regression/cube'), '--dataset regression/cube: no such data; use --dataset regression/sum'),
    (dict(dataset=''), '--loss mse is for numbers: no such data'),
    (dict(loss='ce'), '--loss ce: is for classes'),
    (dict(mixup=0.2), '--mixup: is for images with classes'),
    (dict(eval_metric='top5'), '--eval-metric top5: is not measured for numbers'),
    (dict(model='vgg5'), '--model vgg5: takes no vectors of 8 numbers'),
    (dict(dataset='regression', data_dir='nan.csv'), '--data-dir nan.csv: line 3 holds NaN or an infinite number'),
    (dict(dataset='regression', data_dir='text.csv'), '--data-dir text.csv: line 2 holds what is no number'),
    (dict(dataset='regression', data_dir='short.csv'), '--data-dir short.csv: line 3 has 1 cells, the others 2'),
    (dict(dataset='regression', data_dir='missing.csv'), '--data-dir missing.csv: cannot be read as a table'),
    (dict(dataset='regression', data_dir='empty.csv'), '--data-dir empty.csv: has 0 lines of numbers'),
])
def test_refused_with_nothing_written(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    for name, lines in dict(nan='1,2\n3,nan', text='1,two', short='1,2\n3', empty='').items():
        (tmp_path / f'{name}.csv').write_text(f'x,y\n{lines}\n')
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as e:
        train(config('output', **options))
    assert str(e.value).startswith(message) and '\n' not in str(e.value)
    assert sorted(tmp_path.iterdir()) == before

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open

import timm_spinal
from timm_spinal.training import report
from timm_spinal.training.parser import parse_config
from timm_spinal.training.report import epoch_line, epochs_done, final_lines, write_curves, write_table
from timm_spinal.training.results import export_model
from timm_spinal.training.train import train

from ..conftest import launch_env
from .runs import resumed, small_config

ROOT = Path(__file__).parents[2]

HISTORY = [
    dict(epoch=0, train_loss=2., lr=0.1, images_per_second=10.),
    dict(epoch=1, train_loss=1., lr=0.05, images_per_second=20., eval_loss=1.5, eval_top1=60., eval_top5=90.),
]


def test_table_leaves_missing_values_empty(tmp_path):
    write_table(tmp_path / 'summary.csv', HISTORY)
    first, second = csv.DictReader((tmp_path / 'summary.csv').open())
    assert first['eval_top1'] == '' and float(first['train_loss']) == 2.
    assert float(second['eval_top1']) == 60. and second['epoch'] == '1'


@pytest.mark.parametrize('history', [HISTORY, HISTORY[:1], []])
def test_curves_is_an_image(tmp_path, history):
    write_curves(tmp_path / 'curves.png', history)
    assert Image.open(tmp_path / 'curves.png').size == (1200, 350)


def test_epoch_line():
    assert epoch_line(HISTORY[0], 2) == 'epoch 0 (1 of 2): training loss 2.0000; lr 0.1, 10 images/s'
    assert epoch_line(dict(HISTORY[1], ema_top1=61., ema_loss=1.25), 2) == (
        'epoch 1 (2 of 2): training loss 1.0000; validation top-1 60.00 %, loss 1.5000; '
        'validation of EMA top-1 61.00 %, loss 1.2500; lr 0.05, 20 images/s')
    row = dict(HISTORY[0], eval_loss=1.5, eval_exact=40., eval_digit=60.)
    assert epoch_line(row, 2).startswith(
        'epoch 0 (1 of 2): training loss 2.0000; validation exact pairs 40.00 %, loss 1.5000; lr')


def test_final_lines(tmp_path):
    result = dict(top1=61.5, top5=90., loss=1.25, best_epoch=1, best_weights='ema', skipped=2, seconds=12.34,
                  images_per_second=100.4, model='vgg5', test_top1=60., test_loss=1.3)
    lines = final_lines(result, tmp_path, 'convnext_nano_mlp')
    assert lines[0] == 'validation top-1 61.50 %, top-5 90.00 %, loss 1.2500 of epoch 1 (EMA)'
    assert lines[1] == 'test top-1 60.00 %, loss 1.3000 (once, best weights)'
    assert lines[2] == '2 unreadable images skipped'
    assert lines[3] == f'12.3 s, 100 images/s, results in {tmp_path}'
    assert lines[4] == ("load it: import timm, timm_spinal; timm_spinal.ensure_registered('convnext_nano_mlp'); "
                        f"model = timm.create_model('local-dir:{tmp_path}', pretrained=True)")
    pairs = dict(exact=61.5, digit=80., top2=75., test_exact=60., test_digit=79., test_top2=74.)
    lines = final_lines({**{k: v for k, v in result.items() if 'top' not in k}, **pairs}, tmp_path)
    assert lines[0] == 'validation exact pairs 61.50 %, digits 80.00 %, top-2 75.00 %, loss 1.2500 of epoch 1 (EMA)'
    assert lines[1] == 'test exact pairs 60.00 %, digits 79.00 %, top-2 74.00 %, loss 1.3000 (once, best weights)'


def test_export_is_what_timm_reads(tmp_path):
    """Options of the head, class names, a format entry, contiguous copies of tensors in another layout."""
    timm_spinal.ensure_registered('test_efficientnet_spinal')
    torch.manual_seed(0)
    model = timm.create_model('test_efficientnet_spinal', num_classes=3, head_width=24, drop_rate=0.1).eval()
    model.to(memory_format=torch.channels_last)
    data_config = dict(input_size=(3, 48, 48), mean=(0.1, 0.2, 0.3), std=(1., 1., 1.), interpolation='bicubic',
                       crop_pct=0.9)
    export_model(tmp_path, model, model.state_dict(), ['ant', 'bee', 'cat'], data_config)
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['label_names'] == ['ant', 'bee', 'cat'] and config['model_args']['head_width'] == 24
    assert 'drop_rate' not in config['model_args']
    with safe_open(tmp_path / 'model.safetensors', 'pt') as f:
        assert f.metadata() == {'format': 'pt'}
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(loaded(x), model(x))
    resolved = timm.data.resolve_data_config(model=loaded)
    assert resolved['input_size'] == (3, 48, 48) and resolved['crop_pct'] == 0.9
    assert tuple(resolved['mean']) == (0.1, 0.2, 0.3)


def test_run_folder(tmp_path, capsys):
    """Everything that a run leaves, and that its last line loads the model back with the accuracy that it names."""
    config = small_config(tmp_path, epochs=2, model='test_efficientnet_pspinal', model_kwargs=dict(head_width=16))
    result = train(config)
    folder = tmp_path / 'run'
    assert sorted(p.name for p in folder.iterdir()) == [
        'args.yaml', 'config.json', 'confusion.png', 'curves.png', 'last', 'model.safetensors',
        'predictions.safetensors', 'result.json', 'summary.csv', 'worst.png']
    assert json.loads((folder / 'result.json').read_text()) == result
    assert parse_config(['--config', str(folder / 'args.yaml')]) == replace(config, num_classes=2)
    assert {'top1', 'top5', 'loss', 'epochs', 'seconds', 'images_per_second', 'params'} <= result.keys()
    assert result['epochs'] == 2 and result['train_size'] == 22 and result['seed'] == 3 and result['skipped'] == 0
    assert 0 < result['images_per_second'] == pytest.approx(40 / result['seconds'], rel=0.9)
    table = list(csv.DictReader((folder / 'summary.csv').open()))
    assert float(table[result['best_epoch']]['eval_top1']) == result['top1']

    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith('load it: ')
    names = {}
    exec(line.removeprefix('load it: '), names)
    model = names['model']
    assert sum(p.numel() for p in model.parameters()) == result['params'] == result['trained_params']
    assert model.attached_head.fc.in_features == 3 * 16 or model.num_classes == 2
    # the same accuracy, by hand
    data = timm.data.resolve_data_config(model=model)
    transform = timm.data.create_transform(**data)
    dataset = timm.data.create_dataset('', root=config.data_dir, split='validation', transform=transform)
    images = torch.stack([dataset[i][0] for i in range(len(dataset))])
    targets = torch.tensor([dataset[i][1] for i in range(len(dataset))])
    with torch.no_grad():
        right = (model.eval()(images).argmax(1) == targets).float().mean().item()
    assert 100 * right == pytest.approx(result['top1'])


def test_epochs_are_counted_from_0_everywhere(tmp_path, capsys, monkeypatch):
    """As timm counts them: console, summary.csv, result.json, pictures, and the message of a resumed run."""
    drawn = []
    monkeypatch.setattr(report, 'save_figure', lambda figure, path, dpi: drawn.append(figure))
    config = small_config(tmp_path, epochs=3, stop_epoch=2, eval_metric='loss')
    train(config)
    result = train(resumed(config, stop_epoch=None, model_ema=False, log_interval=4))
    out = capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / 'run' / 'summary.csv').open()))
    losses = [float(row['eval_loss']) for row in rows]
    assert [row['epoch'] for row in rows] == ['0', '1', '2']
    assert result['best_epoch'] == losses.index(min(losses)) and result['epochs'] == 3
    assert f'loss {min(losses):.4f} of epoch {result["best_epoch"]}\n' in out
    for epoch, done in enumerate(('1 of 2', '2 of 2', '3 of 3')):
        line, = [line for line in out.splitlines() if line.startswith(f'epoch {epoch} ({done}): ')]
        assert f'training loss {float(rows[epoch]["train_loss"]):.4f}; validation top-1 ' in line
        assert f', loss {losses[epoch]:.4f}; lr ' in line
    assert 'epoch 2 (3 of 3), update 12: training loss ' in out
    assert 'step-00000010: epoch 2, update 10' in out
    (lines, *_), *_ = [axes.lines for axes in drawn[-1].axes], None
    assert {tuple(line.get_xdata()) for line in lines} == {(0, 1, 2)}
    # a run that was made before its number of epochs was called so
    assert epochs_done(dict(epoch=3, best_epoch=2)) == epochs_done(dict(epochs=3)) == 3


def test_rows_beyond_the_resumed_epoch_are_dropped(tmp_path):
    config = small_config(tmp_path, epochs=3, checkpoint_hist=9)
    train(config)
    second = tmp_path / 'run' / 'last' / 'step-00000010'
    result = train(replace(config, resume=str(second), stop_epoch=2))
    assert result['epochs'] == 2
    assert [row['epoch'] for row in csv.DictReader((tmp_path / 'run' / 'summary.csv').open())] == ['0', '1']


def test_tensorboard(tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    config = small_config(tmp_path, epochs=2, log_with=['tensorboard'], log_interval=2)
    train(config)
    events = EventAccumulator(str(tmp_path / 'run' / 'timm_spinal'))
    events.Reload()
    assert [e.step for e in events.Scalars('eval_top1')] == [5, 10]
    assert [e.step for e in events.Scalars('train/loss')] == [2, 4, 6, 8, 10]
    table = list(csv.DictReader((tmp_path / 'run' / 'summary.csv').open()))
    assert [e.value for e in events.Scalars('eval_top1')] == pytest.approx([float(r['eval_top1']) for r in table])


def test_finished_run_resumes_to_the_same_result(tmp_path):
    config = small_config(tmp_path, epochs=1)
    first = train(config)
    assert train(resumed(config)) == first


def test_pictures_of_mistakes_reach_tensorboard(tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    train(small_config(tmp_path, epochs=1, log_with=['tensorboard']))
    read = EventAccumulator(str(tmp_path / 'run' / 'timm_spinal'), size_guidance=dict(images=0)).Reload()
    assert set(read.Tags()['images']) == {'confusion', 'worst'}
    image, = read.Images('worst')
    assert (image.width, image.height) == Image.open(tmp_path / 'run' / 'worst.png').size


@pytest.mark.slow
def test_trackio_gets_metrics_and_pictures(tmp_path):
    pytest.importorskip('trackio')
    code = ('import sys; sys.path.insert(0, "."); from pathlib import Path; from tests.training.runs import '
            'small_config; from timm_spinal.training.train import train; '
            'train(small_config(Path(sys.argv[1]), epochs=2, log_with=["trackio"]))')
    env = dict(launch_env(), TRACKIO_DIR=str(tmp_path / 'trackio'))  # which is read when it is imported
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path)], env=env, capture_output=True, text=True,
                          timeout=200, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    ask = ('import json; from trackio.sqlite_storage import SQLiteStorage as S; '
           'print(json.dumps(S.get_logs("timm_spinal", "run"), default=str))')
    logs = json.loads(subprocess.run(
        [sys.executable, '-c', ask], env=env, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    losses = [row['eval_loss'] for row in logs if 'eval_loss' in row]
    with open(tmp_path / 'run' / 'summary.csv') as f:
        assert losses == pytest.approx([float(row['eval_loss']) for row in csv.DictReader(f)])
    assert {key for row in logs for key in row} >= {'confusion', 'worst'}
    assert len(list((tmp_path / 'trackio').rglob('*.png'))) >= 2

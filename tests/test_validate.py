import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torchvision import transforms as v1

from timm_spinal.cli import main
from timm_spinal.errors import UserError
from timm_spinal.evaluation.predictions import read_predictions
from timm_spinal.training.checkpoint import find_checkpoints
from timm_spinal.training.config import ValidateConfig
from timm_spinal.training.data import create_eval_loader
from timm_spinal.training.splits import create_datasets
from timm_spinal.training.train import train
from timm_spinal.validate import validate

from .training.runs import small_config


@pytest.fixture
def trained(tmp_path):
    config = small_config(tmp_path, epochs=2, model_ema=True, model_ema_decay=0.5)
    return config, train(config)


def options(config, **kwargs):
    return ValidateConfig(**{**dict(data_dir=config.data_dir, batch_size=5, workers=0), **kwargs})


def test_run_folder_gives_the_numbers_of_the_run(trained, tmp_path):
    config, result = trained
    for where in (dict(checkpoint=str(tmp_path / 'run')), dict(model=f'local-dir:{tmp_path / "run"}')):
        row, = validate(options(config, **where))
        assert row['top1'] == pytest.approx(result['top1']) and row['loss'] == pytest.approx(result['loss'], rel=1e-6)
        assert row['images'] == 22 and row['top1_err'] == pytest.approx(100 - result['top1'])
        assert row['param_count'] == round(result['params'] / 1e6, 2) and row['img_size'] == 32


def test_checkpoint_and_its_average(trained, tmp_path):
    config, _ = trained
    last = list(csv.DictReader((tmp_path / 'run' / 'summary.csv').open()))[-1]
    newest = find_checkpoints(tmp_path / 'run' / 'last')[0]
    plain, = validate(options(config, checkpoint=str(newest)))
    average, = validate(options(config, checkpoint=str(tmp_path / 'run'), use_ema=True))
    assert plain['loss'] == pytest.approx(float(last['eval_loss']), rel=1e-6)
    assert average['loss'] == pytest.approx(float(last['ema_loss']), rel=1e-6)


def test_weights_file(trained, tmp_path):
    config, result = trained
    path = tmp_path / 'weights.pth'
    torch.save(dict(state_dict=load_file(tmp_path / 'run' / 'model.safetensors')), path)
    row, = validate(options(config, checkpoint=str(path), model=config.model, num_classes=2, img_size=32))
    assert row['top1'] == pytest.approx(result['top1'])
    with pytest.raises(UserError, match='the weights are not of test_resnet'):
        validate(options(config, checkpoint=str(path), model='test_resnet', num_classes=2))


def test_several_at_once_go_on_after_an_error(trained, tmp_path, capsys):
    config, result = trained
    train(replace(config, experiment='run2', epochs=1, model='test_resnet'))
    (tmp_path / 'run3').mkdir()
    argv = ['validate', '--checkpoint', str(tmp_path / 'run*'), '--data-dir', config.data_dir, '-j', '0']
    for suffix in ('csv', 'json'):
        assert main([*argv, '--results-file', str(tmp_path / f'all.{suffix}')]) == 2
    rows = list(csv.DictReader((tmp_path / 'all.csv').open()))
    assert [row['model'] for row in rows] == [str(tmp_path / name) for name in ('run', 'run2', 'run3')]
    assert float(rows[0]['top1']) == pytest.approx(result['top1'])
    assert 'neither a run folder nor a checkpoint' in rows[2]['error'] and rows[0]['error'] == ''
    assert [row['model'] for row in json.loads((tmp_path / 'all.json').read_text())] == [row['model'] for row in rows]
    assert 'top-1' in capsys.readouterr().out


def test_wildcard_of_models(trained, capsys):
    config, _ = trained
    rows = validate(options(config, model='test_efficientnet_[gl]n', num_classes=2, img_size=32))
    assert [row['model'] for row in rows] == ['test_efficientnet_gn', 'test_efficientnet_ln']
    assert len(capsys.readouterr().out.splitlines()) == 2
    (Path(config.data_dir) / 'validation' / 'ant' / 'x.txt').touch()
    validate(options(config, model='test_efficientnet_[gl]n', num_classes=2, img_size=32))
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == f'{config.data_dir}/validation: skipped 1 of other types (.txt)' and len(rest) == 2


@pytest.mark.parametrize('kwargs, text', [
    (dict(checkpoint='/nowhere'), 'checkpoint /nowhere: no such file or folder'),
    (dict(checkpoint='/nowhere/*'), r'checkpoint /nowhere/\*: no file or folder matches it'),
    (dict(model='nothing_*'), r"model 'nothing_\*': no model matches"),
    (dict(results_file='out.xls'), 'results_file out.xls: unknown format'),
    (dict(model='test_vit', img_size=32), 'classes: .* has 2 classes, the model has 1000'),
])
def test_errors(tmp_path, kwargs, text):
    with pytest.raises(UserError, match=text):
        validate(options(small_config(tmp_path), **kwargs))


def test_damaged_checkpoint_is_refused(trained, tmp_path):
    config, _ = trained
    newest = find_checkpoints(tmp_path / 'run' / 'last')[0]
    (newest / 'model.safetensors').write_bytes(b'')
    with pytest.raises(UserError, match='is damaged: model.safetensors has 0 bytes'):
        validate(options(config, checkpoint=str(newest)))


def test_other_classes_are_refused(trained, tmp_path):
    config, _ = trained
    for split in ('train', 'validation'):
        (tmp_path / 'images' / split / 'ant').rename(tmp_path / 'images' / split / 'cat')
    with pytest.raises(UserError, match="other classes than those of the data .its 'ant' is 'bee'."):
        validate(options(config, checkpoint=str(tmp_path / 'run')))


def ten_crop_by_hand(model, root, size):
    """Resize to 40, ten crops of 32, mean probability: loss and accuracy with torchvision's own pieces."""
    data = timm.data.resolve_data_config(model=model)
    transform = v1.Compose([
        v1.Resize(size, v1.InterpolationMode(data['interpolation'])), v1.TenCrop(32),
        v1.Lambda(lambda crops: torch.stack([v1.functional.to_tensor(c) for c in crops])),
        v1.Normalize(data['mean'], data['std'])])
    dataset = timm.data.create_dataset('', root=root, split='validation', transform=transform)
    crops, targets = zip(*(dataset[i] for i in range(len(dataset))))
    with torch.no_grad():
        mean = torch.stack([model(c).softmax(-1).mean(0) for c in crops])
    targets = torch.tensor(targets)
    top1 = 100 * (mean.argmax(1) == targets).float().mean().item()
    return top1, -mean.gather(1, targets[:, None]).log().mean().item()


@pytest.mark.slow
def test_ten_crops(tmp_path, launch):
    config = small_config(tmp_path, epochs=2, model='test_vit', opt='adamw', lr=0.003, train_split='validation')
    train(config)
    model = timm.create_model(f'local-dir:{tmp_path / "run"}', pretrained=True).eval()
    top1, loss = ten_crop_by_hand(model, config.data_dir, 40)
    where = dict(checkpoint=str(tmp_path / 'run'), crop_pct=0.8)
    row, = validate(options(config, crops=10, **where))
    assert row['crops'] == 10 and row['images'] == 22
    assert row['top1'] == pytest.approx(top1) and row['loss'] == pytest.approx(loss, rel=1e-5)
    single, = validate(options(config, **where))
    assert single['crops'] == 1 and single['loss'] != pytest.approx(loss, rel=1e-3)
    done = launch(2, '-m', 'timm_spinal.validate', '--checkpoint', str(tmp_path / 'run'), '--crop-pct', '0.8',
                  '--data-dir', config.data_dir, '-b', '3', '-j', '0', '--crops', '10',
                  '--results-file', str(tmp_path / 'ten.json'))
    two, = json.loads((tmp_path / 'ten.json').read_text())
    assert 'error' not in done.stderr and two['images'] == 22
    assert two['top1'] == pytest.approx(top1) and two['loss'] == pytest.approx(loss, rel=1e-5)


def test_crops_that_say_little_or_cannot_be(trained, tmp_path, capsys):
    config, _ = trained
    where = dict(checkpoint=str(tmp_path / 'run'), crops=10)
    validate(options(config, crop_pct=1., **where))
    assert 'crop_pct is 1, so the crops of a square image differ by mirroring only' in capsys.readouterr().out
    row, = validate(options(config, crop_pct=0.8, crop_mode='squash', channels_last=True, **where))
    assert row['images'] == 22
    with pytest.raises(UserError, match='--crops 10: images of --crop-mode border are smaller than a crop'):
        validate(options(config, crop_mode='border', **where))
    assert main(['validate', '--crops', '5', '--data-dir', config.data_dir]) == 2
    assert "--crops: '5' is not one of 1, 10" in capsys.readouterr().err


def test_a_detector_is_no_classifier(trained, tmp_path):
    config, _ = trained
    (tmp_path / 'detector').mkdir()
    (tmp_path / 'detector' / 'config.json').write_text(json.dumps(dict(detector={}, class_names=[])))
    with pytest.raises(UserError, match="no 'architecture', .* to open a detector, use timm_spinal.detection.load_det"):
        validate(options(config, model=f'local-dir:{tmp_path / "detector"}'))


def test_report_of_a_run(trained, tmp_path, capsys):
    pytest.importorskip('sklearn')
    config, result = trained
    run = tmp_path / 'run'
    assert (run / 'confusion.png').stat().st_size > 5000 and (run / 'worst.png').stat().st_size > 5000
    assert main(['validate', '--model', f'local-dir:{run}', '--data-dir', config.data_dir, '--workers', '0', '--report',
                 str(tmp_path / 'out')]) == 0
    rows = list(csv.DictReader((tmp_path / 'out' / 'predictions.csv').open()))
    assert len(rows) == 22 and {row['file'].split('/')[0] for row in rows} == {'ant', 'bee'}
    assert all(row['file'].startswith(row['target']) for row in rows)
    right = sum(row['target'] == row['prediction'] for row in rows)
    assert 100 * right / 22 == pytest.approx(result['top1'])
    assert sum(float(row['loss']) for row in rows) / 22 == pytest.approx(result['loss'], rel=1e-5)
    # the run has kept the same of its validation split
    kept = read_predictions(run, 'validation')
    assert read_predictions(run) is None and kept['file'].tolist() == [row['file'] for row in rows]
    assert kept['loss'].tolist() == pytest.approx([float(row['loss']) for row in rows], rel=1e-4)
    assert f'top-1</th><td>{result["top1"]:.2f} %' in (tmp_path / 'out' / 'report.html').read_text()


def test_names_of_files_stay_right_beside_unreadable_images(trained, tmp_path):
    pytest.importorskip('sklearn')
    config, _ = trained
    bad = tmp_path / 'images' / 'validation' / 'ant' / '2.png'
    bad.write_bytes(b'x')
    unreadable = dict(report=str(tmp_path / 'out'), skip_unreadable=True)
    row, = validate(options(config, checkpoint=str(tmp_path / 'run'), **unreadable))
    rows = list(csv.DictReader((tmp_path / 'out' / 'predictions.csv').open()))
    assert row['skipped'] == 1 and len(rows) == 21 and 'ant/2.png' not in [r['file'] for r in rows]
    assert all(r['file'].startswith(r['target']) for r in rows)


@pytest.mark.parametrize('more, message', [
    (dict(report='{tmp}/images/validation/ant/0.png'), 'is a file; name a folder'),
    (dict(report='{tmp}/no/out'), 'there is no folder'),
    (dict(report='{tmp}/out', model='test_*', checkpoint=''), 'is for a single model, and'),
])
def test_reports_that_cannot_be(trained, tmp_path, more, message):
    pytest.importorskip('sklearn')
    config, _ = trained
    more = {k: v.format(tmp=tmp_path) for k, v in more.items()}
    with pytest.raises(UserError, match=message):
        validate(options(config, **{'checkpoint': str(tmp_path / 'run'), **more}))
    assert not (tmp_path / 'out').exists()


def test_flips_average_an_image_and_its_mirror_image(trained, tmp_path):
    config, _ = trained
    model = timm.create_model(f'local-dir:{tmp_path / "run"}', pretrained=True).eval()
    datasets = create_datasets(config, train=False)
    loader, _ = create_eval_loader(options(config), model, datasets)
    loss = 0.
    with torch.no_grad():
        for images, target in loader:
            both = torch.stack([model(images).log_softmax(1), model(images.flip(-1)).log_softmax(1)])
            loss -= (both.logsumexp(0) - math.log(2))[range(len(target)), target].sum().item()
    row, = validate(options(config, checkpoint=str(tmp_path / 'run'), tta='flip'))
    assert row['loss'] == pytest.approx(loss / 22, rel=1e-5) and row['tta'] == 'flip'
    ten, = validate(options(config, checkpoint=str(tmp_path / 'run'), crops=10, crop_pct=0.8))
    both, = validate(options(config, checkpoint=str(tmp_path / 'run'), crops=10, crop_pct=0.8, tta='flip'))
    assert both['loss'] == pytest.approx(ten['loss'], rel=1e-5)  # ten crops have their mirror images among them

"""Whole runs on shapes that are drawn here: run folder, exact resume, several processes, precision, errors."""
import csv
import json
import math
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from tests.training.runs import assert_same_state, last_state, send_signal
from timm_spinal.cli import main
from timm_spinal.detection import load_detector
from timm_spinal.detection.coco_metrics import Detections, average_precision
from timm_spinal.detection.data import DetectionData, open_splits
from timm_spinal.detection.options import METRICS, DetectionConfig
from timm_spinal.detection.problem import DetectionTask, train_detector
from timm_spinal.errors import StopRequested, UserError
from timm_spinal.training.config import to_yaml

from .shapes import write_coco, write_voc

FEW = dict(rpn_pre_nms_top_n_train=100, rpn_post_nms_top_n_train=50, rpn_pre_nms_top_n_test=100,
           rpn_post_nms_top_n_test=50, box_batch_size_per_image=32)


def small_config(tmp_path: Path, **options) -> DetectionConfig:
    """Two epochs of four updates on 16 images of 64 pixels."""
    if not (tmp_path / 'shapes').exists():
        write_coco(tmp_path / 'shapes', train=16, val=5)
    defaults = dict(
        data_dir=str(tmp_path / 'shapes'), backbone='test_resnet', fpn_channels=16, anchor_scale=4., min_size=[64],
        max_size=96, batch_size=4, workers=0, epochs=2, opt='adamw', lr=1e-3, sched='cosine', output=str(tmp_path),
        experiment='run', seed=3, log_interval=100, detector_kwargs=FEW,
    )
    return DetectionConfig(**{**defaults, **options})


RETINA = dict(model='retinanet', anchor_scale=2., detector_kwargs={})


def rows(config):
    with open(f'{config.output}/{config.experiment}/summary.csv') as f:
        return list(csv.DictReader(f))


def measured_again(config, split='eval'):
    """AP of the saved detector, image by image."""
    records = open_splits(config)[split].images
    model, found = load_detector(f'{config.output}/{config.experiment}'), {}
    data = DetectionData(records)
    with torch.no_grad():
        for i in range(len(data)):
            answer = model([data[i, None][0]])[0]
            found[i] = Detections(*(answer[name].numpy() for name in Detections._fields))
    return average_precision(records, found, 2)


def test_run_folder(tmp_path, capsys):
    config = small_config(tmp_path, test_split='val', model_ema=True, model_ema_decay=0.5)
    result = train_detector(config)
    folder = tmp_path / 'run'
    assert {p.name for p in folder.iterdir()} == {
        'args.yaml', 'summary.csv', 'curves.png', 'boxes.png', 'result.json', 'last', 'model.safetensors',
        'config.json'}
    assert json.loads((folder / 'result.json').read_text()) == result
    assert DetectionConfig(**yaml.safe_load((folder / 'args.yaml').read_text())) == config
    one, two = rows(config)
    losses = ('loss_classifier', 'loss_box_reg', 'loss_objectness', 'loss_rpn_box_reg')
    assert float(two['train_loss']) == pytest.approx(sum(float(two[f'train_{name}']) for name in losses))
    assert float(two['train_loss']) < float(one['train_loss'])
    assert all(f'{weights}_{name}' in two for weights in ('eval', 'ema') for name in METRICS)
    best = max((float(row[f'{w}_ap']), -i) for i, row in enumerate((one, two)) for w in ('eval', 'ema'))
    assert result['ap'] == pytest.approx(best[0]) and result['best_metric'] == 'ap'
    assert result['test_ap'] == result['ap'] and result['test_images'] == 5
    assert result['train_size'] == 16 and result['num_classes'] == 3 and result['updates'] == 8
    assert result['annotations']['train']['images'] == 16 and result['annotations']['train']['empty'] == 0
    again = measured_again(config)
    assert again['ap50'] == pytest.approx(result['ap50'], abs=1e-3)
    with Image.open(folder / 'boxes.png') as image:
        assert image.width > 400 and len(image.convert('RGB').getcolors(1 << 24)) > 20
    out = capsys.readouterr().out
    assert '(train): 16 images, ' in out and f'load_detector({str(folder)!r})' in out.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize('options', [
    dict(model_ema=True, model_ema_decay=0.8, grad_accum_steps=2, batch_size=2, min_size=[48, 64]),
    dict(RETINA, backbone='resnet20_cifar', model='fasterrcnn', anchor_scale=4., opt='sgd', frozen_bn=True,
         trainable_layers=2),
], ids=['ema', 'frozen'])
def test_exact_resume_in_an_epoch(tmp_path, monkeypatch, options):
    """Stopped by SIGTERM in the second update of the second epoch: the end is bit-identical."""
    whole = small_config(tmp_path, experiment='whole', **options)
    train_detector(whole)
    cut = replace(whole, experiment='cut')
    calls, forward = [], DetectionTask.forward
    batches = 16 // whole.batch_size

    def stop(self, images, targets):
        calls.append(1)
        if len(calls) == batches + whole.grad_accum_steps + 1:
            send_signal(signal.SIGTERM)
        return forward(self, images, targets)

    with monkeypatch.context() as patch:
        patch.setattr(DetectionTask, 'forward', stop)
        with pytest.raises(StopRequested):
            train_detector(cut)
    assert batches < len(calls) < 2 * batches
    train_detector(replace(cut, resume='auto'))
    assert_same_state(whole, cut)
    assert len(last_state(whole)) > 50
    drop = ('seconds', 'images_per_second')
    assert [{k: v for k, v in r.items() if k not in drop} for r in rows(whole)] == [
        {k: v for k, v in r.items() if k not in drop} for r in rows(cut)]


def test_resume_refuses_another_detector(tmp_path):
    config = small_config(tmp_path, epochs=1)
    train_detector(config)
    with pytest.raises(UserError, match=r"made with other settings: backbone \('test_resnet' -> 'test_convnext'\)"):
        train_detector(replace(config, resume='auto', backbone='test_convnext'))
    with pytest.raises(UserError, match='contains a run already'):
        train_detector(config)


def test_voc_retinanet_in_bfloat16_from_the_command_line(tmp_path):
    write_voc(tmp_path / 'voc', train=8, val=3)
    config = small_config(tmp_path, data_dir=str(tmp_path / 'voc'), epochs=1, mixed_precision='bf16', **RETINA)
    (tmp_path / 'config.yaml').write_text(to_yaml(config))
    assert main(['train-detection', '--config', str(tmp_path / 'config.yaml'), '--lr', '2e-3']) == 0
    result = json.loads((tmp_path / 'run' / 'result.json').read_text())
    assert result['updates'] == 2 and result['annotations']['eval']['images'] == 3
    assert math.isfinite(float(rows(config)[0]['train_bbox_regression']))


@pytest.mark.slow
def test_images_without_boxes_train_too(tmp_path):
    from .shapes import read_json, write_json
    config = small_config(tmp_path, epochs=1, keep_empty=True)
    content = read_json(tmp_path / 'shapes', 'train')
    write_json(tmp_path / 'shapes', 'train', dict(content, annotations=content['annotations'][:1]))
    assert train_detector(config)['train_size'] == 16
    assert math.isfinite(float(rows(config)[0]['train_loss']))
    assert train_detector(replace(config, keep_empty=False, batch_size=1, experiment='one'))['train_size'] == 1


@pytest.mark.parametrize('flags, message', [
    (['--data-dir', 'no/such'], 'error: data folder no/such: does not exist; check --data-dir'),
    (['--backbone', 'resnet5'], "error: unknown model 'resnet5'; the nearest are resnet50"),
    (['--model', 'yolo'], "error: --model: 'yolo' is not one of fasterrcnn, retinanet"),
    (['--eval-metric', 'top1'], "error: --eval-metric: 'top1' is not one of ap, ap50, ap75"),
    (['--mixup', '0.2'], 'error: unknown flag --mixup: it belongs to the training of classifiers'),
    (['--val-split', 'nothing'], "no split 'nothing'"),
    (['--opt', 'sdg'], "error: unknown optimizer 'sdg'"),
])
def test_errors_are_one_line_and_nothing_is_written(tmp_path, capsys, flags, message):
    write_coco(tmp_path / 'shapes', train=4, val=2)
    start = ['train-detection', '--data-dir', str(tmp_path / 'shapes'), '--output', str(tmp_path / 'out'), '--backbone',
             'test_resnet', '-j', '0', '--experiment', 'run']
    assert main([*start, *flags]) == 2
    err = capsys.readouterr().err.strip()
    assert message in err and '\n' not in err
    assert not (tmp_path / 'out').exists()


def test_keys_of_the_image_trainer_are_not_passed_over(tmp_path, capsys):
    (tmp_path / 'config.yaml').write_text('mixup: 0.2\n')
    assert main(['train-detection', '--config', str(tmp_path / 'config.yaml')]) == 2
    assert "unknown key 'mixup'" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes(tmp_path, launch):
    """Both share the work: half the updates, and five images evaluated exactly once."""
    config = small_config(tmp_path, epochs=2, batch_size=2, backbone='resnet20_cifar')
    (tmp_path / 'config.yaml').write_text(to_yaml(config))
    done = launch(2, '-m', 'timm_spinal.detection.train', '--config', str(tmp_path / 'config.yaml'))
    result = json.loads((tmp_path / 'run' / 'result.json').read_text())
    assert result['processes'] == 2 and result['updates'] == 8 and result['eval_size'] == 5
    assert done.stdout.count('run folder: ') == 1
    assert measured_again(config)['ap50'] == pytest.approx(result['ap50'], abs=1e-3)
    bad = launch(2, '-m', 'timm_spinal.detection.train', '--config', str(tmp_path / 'config.yaml'), check=False)
    assert bad.returncode != 0 and bad.stderr.count('contains a run already') == 1


@pytest.mark.slow
@pytest.mark.parametrize('options', [
    dict(backbone='resnet18_sb_s32u1', epochs=16),
    dict(RETINA, epochs=80, fpn_channels=64, lr=2e-3, clip_grad=1.),
], ids=['fasterrcnn-resnet18_sb_s32u1', 'retinanet-test_resnet'])
def test_overfits_the_shapes(tmp_path, options):
    """The images that it trained on: AP50 above 0.9."""
    config = small_config(tmp_path, **{**dict(
        fpn_channels=32, val_split='train', val_interval=options['epochs'], hflip=0., warmup_epochs=1.), **options})
    result = train_detector(config)
    assert result['ap50'] > 90. and result['ap'] > 40.


@pytest.mark.slow
def test_weights_of_the_backbone_are_told_and_needed_once(tmp_path, capsys):
    torch.manual_seed(1)
    file = tmp_path / 'start.safetensors'
    save_file(timm.create_model('test_resnet', num_classes=5).state_dict(), file)
    whole = small_config(tmp_path, experiment='whole', backbone_path=str(file))
    result = train_detector(whole)
    assert f'weights {file}: 90 tensors loaded, 2 left out (fc.bias, fc.weight), none new' in capsys.readouterr().out
    assert result['weights'] == dict(
        source=str(file), loaded=90, left_out=['fc.bias', 'fc.weight'], new=[])
    half = replace(whole, experiment='half', stop_epoch=1)
    train_detector(half)
    file.unlink()
    train_detector(replace(half, stop_epoch=None, resume='auto'))
    said = 'the weights that the run started from are not checked again (backbone test_resnet: '
    assert said in capsys.readouterr().out
    assert_same_state(whole, half)

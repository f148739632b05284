import pytest
import timm
import torch
from safetensors.torch import save_file
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection import retinanet as tv_retinanet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from timm_spinal.detection import create_detector, load_detector
from timm_spinal.detection.saved import save_detector
from timm_spinal.errors import UserError
from timm_spinal.training.results import export_model

SMALL = dict(num_classes=4, min_size=64, max_size=96, fpn_channels=16)


def images():
    generator = torch.Generator().manual_seed(5)
    return [torch.rand(3, 50, 60, generator=generator), torch.rand(3, 64, 40, generator=generator)]


def targets():
    return [dict(boxes=torch.tensor([[5., 5., 40., 45.], [10., 2., 30., 20.]]), labels=torch.tensor([1, 3])),
            dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))]


def torchvisions(name):
    sizes = dict(num_classes=4, min_size=64, max_size=96)
    body = dict(backbone_name='resnet18', weights=None, trainable_layers=5, norm_layer=torch.nn.BatchNorm2d)
    if name == 'fasterrcnn':
        return FasterRCNN(resnet_fpn_backbone(**body), **sizes)
    body = resnet_fpn_backbone(**body, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256))
    return RetinaNet(body, anchor_generator=tv_retinanet._default_anchorgen(), **sizes)


@pytest.mark.parametrize('name', ['fasterrcnn', 'retinanet'])
def test_is_torchvisions_over_resnet18(name):
    """Same names of weights, same losses and same detections, bit by bit."""
    torch.manual_seed(0)
    theirs = torchvisions(name)
    ours = create_detector(name, 'resnet18', num_classes=4, min_size=64, max_size=96)
    ours.load_state_dict(theirs.state_dict())
    found = []
    for model in (ours, theirs):
        torch.manual_seed(1)
        losses = model.train()(images(), targets())
        # of the same class, each on the other's place
        getattr(model, 'roi_heads', model).score_thresh = 0.
        with torch.no_grad():
            found.append((losses, model.eval()(images())))
    assert found[0][0].keys() == found[1][0].keys()
    assert all(torch.equal(found[0][0][k], found[1][0][k]) for k in found[0][0])
    for a, b in zip(found[0][1], found[1][1]):
        assert len(a['boxes']) > 10 and all(torch.equal(a[k], b[k]) for k in ('boxes', 'labels', 'scores'))


@pytest.mark.parametrize('name, backbone, parameters', [
    ('fasterrcnn', 'resnet50', 41_755_286), ('retinanet', 'resnet50', 34_014_999),
    ('fasterrcnn', 'resnet50_sb', 36_704_918),
])
def test_number_of_parameters(name, backbone, parameters):
    """torchvision's own numbers, which leave out frozen BatchNorm; the shared bases save their 5,050,368."""
    with torch.device('meta'):
        model = create_detector(name, backbone, frozen_bn=True)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters


@pytest.mark.parametrize('name, backbone, strides', [
    ('fasterrcnn', 'resnet18_sb_s32u1', [4, 8, 16, 32]),
    ('retinanet', 'mobilenetv2_100_sb', [8, 16, 32]),
    ('retinanet', 'icresnet18', [8, 16, 32]),
    ('fasterrcnn', 'test_resnet_pspinal', [4, 8, 16, 32]),
    ('fasterrcnn', 'resnet20_cifar', [4]),
    ('fasterrcnn', 'test_convnext', [4, 8, 16, 32]),
    ('retinanet', 'test_efficientnet', [8, 16, 32]),
    ('fasterrcnn', 'test_vit', [16]),
])
def test_every_kind_of_backbone_trains_and_detects(name, backbone, strides):
    torch.manual_seed(0)
    model = create_detector(name, backbone, **SMALL)
    assert model.backbone.strides == strides
    losses = model(images(), targets())
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    first = next(model.backbone.body.parameters())
    assert first.grad is not None and first.grad.abs().sum() > 0
    with torch.no_grad():
        found = model.eval()(images())
    assert len(found) == 2 and set(found[0]) == {'boxes', 'labels', 'scores'}
    for answer, image in zip(found, images()):
        assert (answer['boxes'] >= 0).all() and (answer['boxes'][:, 2] <= image.shape[2] + 1e-3).all()


def test_features_that_are_channels_last():
    """Swin gives (N, H, W, C)."""
    tiny = dict(strict_img_size=False, embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))
    model = create_detector('retinanet', 'swin_tiny_patch4_window7_224', backbone_kwargs=tiny, **SMALL)
    levels = model.backbone(torch.rand(1, 3, 64, 96))
    assert [tuple(level.shape[1:]) for level in levels.values()] == [
        (16, 8, 12), (16, 4, 6), (16, 2, 3), (16, 1, 2), (16, 1, 1)]


def statistics(model):
    return {k: v.clone() for k, v in model.state_dict().items() if 'running' in k}


@pytest.mark.parametrize('frozen', [True, False])
def test_frozen_batch_norm_neither_trains_nor_counts(frozen):
    model = create_detector('retinanet', 'resnet18_sb_s32u1', frozen_bn=frozen, **SMALL).train()
    before = statistics(model)
    sum(model(images(), targets()).values()).backward()
    after = statistics(model)
    assert [k for k in before if not torch.equal(before[k], after[k])] == ([] if frozen else list(before))
    norms = [m for m in model.backbone.body.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and all((m.weight.grad is None) == frozen for m in norms)
    assert model.backbone.body.conv1.weight.grad is not None


def trained(model):
    return {n.split('.')[0] for n, p in model.backbone.body.named_parameters() if p.requires_grad}


@pytest.mark.parametrize('backbone, layers, expected', [
    ('resnet18', 0, set()),
    ('resnet18', 3, {'layer2', 'layer3', 'layer4'}),
    ('resnet18', 4, {'layer1', 'layer2', 'layer3', 'layer4'}),
    ('resnet18', 5, {'conv1', 'bn1', 'layer1', 'layer2', 'layer3', 'layer4'}),
    ('resnet18_sb_s32u1', 2, {'layer3', 'layer4'}),
    ('test_convnext', 1, {'stages_3'}),
])
def test_layers_are_counted_from_the_last_as_torchvision_does(backbone, layers, expected):
    model = create_detector('fasterrcnn', backbone, trainable_layers=layers, **SMALL)
    assert trained(model) == expected
    assert all(p.requires_grad for p in model.backbone.fpn.parameters())


def saved_backbone(folder):
    model = timm.create_model('test_resnet', num_classes=7)
    export_model(folder, model, model.state_dict(), None, {})
    return model


def test_weights_of_a_training_run(tmp_path):
    """By the folder and by the file; with weights, three layers train and BatchNorm stays."""
    model = saved_backbone(tmp_path)
    for options in (dict(backbone=f'local-dir:{tmp_path}', pretrained_backbone=True),
                    dict(backbone='test_resnet', pretrained_backbone=str(tmp_path / 'model.safetensors'))):
        detector = create_detector('retinanet', **options, **SMALL)
        theirs = model.state_dict()
        for key, value in detector.backbone.body.state_dict().items():
            assert torch.equal(value, theirs[key])
        assert trained(detector) == {'layer2', 'layer3', 'layer4'}
        assert not any(m.training for m in detector.backbone.body.modules() if isinstance(m, torch.nn.BatchNorm2d))
        assert detector.options['backbone'] == 'test_resnet'


def test_save_and_load(tmp_path):
    saved_backbone(tmp_path)
    made = create_detector(
        'fasterrcnn', f'local-dir:{tmp_path}', pretrained_backbone=True, box_score_thresh=0., **SMALL)
    (tmp_path / 'run').mkdir()
    save_detector(tmp_path / 'run', made, made.state_dict(), ['a', 'b', 'c'])
    loaded = load_detector(tmp_path / 'run')
    assert loaded.class_names == ['a', 'b', 'c'] and loaded.options == made.options and not loaded.training
    with torch.no_grad():
        one, two = made.eval()(images()), loaded(images())
    assert len(one[0]['boxes']) > 10 and all(torch.equal(a[k], b[k]) for a, b in zip(one, two) for k in a)
    assert trained(loaded) == trained(made)


@pytest.mark.parametrize('options, message', [
    (dict(name='yolo'), "unknown detector 'yolo'; known are fasterrcnn, retinanet"),
    (dict(backbone='test_resne'), "unknown model 'test_resne'; the nearest are test_resnet"),
    (dict(backbone='vgg5'), 'backbone vgg5: does not take RGB images of any size'),
    (dict(name='retinanet', backbone='resnet20_cifar'), 'features have the strides 1, 1, 2, 4, and the detector needs'),
    (dict(trainable_layers=6), 'trainable_layers 6: the backbone has only 5 layers; give at most 5'),
    (dict(pretrained_backbone='no.safetensors'), 'backbone test_resnet: no.safetensors: no such file'),
    (dict(backbone='resnet18_sb_s32u1', pretrained_backbone=True), 'No pretrained weights exist'),
    (dict(backbone_kwargs=dict(depth=3)), "unexpected keyword argument 'depth'"),
    (dict(box_score_tresh=0.1), "unknown option 'box_score_tresh'; did you mean box_score_thresh?"),
    (dict(num_classes=1), 'num_classes 1: background is one, so give 2 or more'),
])
def test_errors_are_one_line(options, message):
    with pytest.raises(UserError) as error:
        create_detector(**{**SMALL, 'name': 'fasterrcnn', 'backbone': 'test_resnet', **options})
    assert message in str(error.value) and '\n' not in str(error.value)


def test_weights_of_another_model_are_refused(tmp_path):
    other = {k: v + 1 for k, v in timm.create_model('test_resnet').state_dict().items()}
    save_file({f'deep.{k}': v for k, v in other.items()}, tmp_path / 'other.safetensors')
    with pytest.raises(UserError, match='the weights are not of test_resnet: they fill 0 of 75 tensors of the backb'):
        create_detector('retinanet', 'test_resnet', pretrained_backbone=str(tmp_path / 'other.safetensors'), **SMALL)


def test_loading_what_is_no_detector(tmp_path):
    with pytest.raises(UserError, match='has no config.json; give a run folder'):
        load_detector(tmp_path)
    saved_backbone(tmp_path)
    with pytest.raises(UserError, match='is not the run of a detector'):
        load_detector(tmp_path)
    made = create_detector('retinanet', 'test_resnet', **SMALL)
    save_detector(tmp_path, made, made.state_dict(), ['a', 'b', 'c'])
    (tmp_path / 'model.safetensors').write_bytes(b'short')
    with pytest.raises(UserError, match='does not fit or is damaged'):
        load_detector(tmp_path)


def test_what_became_of_the_weights(tmp_path):
    """The head is left out, and no classifier is called new in a backbone that has none."""
    saved_backbone(tmp_path)
    detector = create_detector(
        'retinanet', 'test_resnet', pretrained_backbone=str(tmp_path / 'model.safetensors'), **SMALL)
    assert str(detector.loaded_weights) == (
        f'{tmp_path}/model.safetensors: 90 tensors loaded, 2 left out (fc.bias, fc.weight), none new')
    assert create_detector('retinanet', 'test_resnet', **SMALL).loaded_weights is None

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import save_for_hf

from timm_spinal.errors import UserError
from timm_spinal.training.config import TrainConfig
from timm_spinal.training.task import build_task
from timm_spinal.training.teacher import load_teacher, open_teacher
from timm_spinal.training.transforms import resolve_data
from timm_spinal.training.wld import WLDTask


def make(name='test_resnet', **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{**dict(num_classes=3), **kwargs}).eval()


def save(folder, name='test_resnet', data=None, classes=None, **kwargs):
    """A run folder as far as a teacher goes."""
    model = make(name, **kwargs)
    save_for_hf(model, folder, model_config=dict(label_names=classes) if classes else None,
                model_args={k: v for k, v in kwargs.items() if k != 'num_classes'}, safe_serialization=True,
                data_config=data)
    return model


def data_of(model, **changes):
    return {**resolve_data(TrainConfig(img_size=32), model), **changes}


def images(channels=3):
    return torch.randn(4, channels, 32, 32, generator=torch.Generator().manual_seed(1))


def test_names(tmp_path):
    expected = save(tmp_path / 'run')
    for name in (str(tmp_path / 'run'), f'local-dir:{tmp_path / "run"}'):
        model = load_teacher(name)
        assert all(torch.equal(v, expected.state_dict()[k]) for k, v in model.state_dict().items())


def test_head_variant_of_ours_is_registered(tmp_path):
    import timm_spinal
    timm_spinal.ensure_registered('test_resnet_spinal')
    save(tmp_path / 'run', 'test_resnet_spinal', head_width=8)
    assert load_teacher(str(tmp_path / 'run')).num_classes == 3


def test_a_folder_does_not_hide_a_model(tmp_path, monkeypatch):
    (tmp_path / 'test_resnet').mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='teacher test_resnet: (?!.*not found there)'):
        load_teacher('test_resnet')  # goes to the Hub, which tests have not


@pytest.mark.parametrize('name, text', [
    ('no_such_model', "teacher no_such_model: unknown model 'no_such_model'"),
    ('vgg5', 'teacher vgg5: No pretrained weights exist for vgg5'),
    ('local-dir:/nowhere', 'teacher local-dir:/nowhere: config.json and model.safetensors not found there'),
    ('hf-hub:nobody/nothing', 'teacher hf-hub:nobody/nothing: '),
])
def test_names_that_are_none(name, text):
    with pytest.raises(UserError, match=text) as error:
        load_teacher(name)
    assert '\n' not in str(error.value)


def test_unfinished_run(tmp_path):
    (tmp_path / 'last').mkdir()
    with pytest.raises(UserError, match='not found there; give the folder of a finished run'):
        load_teacher(str(tmp_path))


@pytest.mark.parametrize('teacher, text', [
    (dict(num_classes=5), 'has 5 classes, the student 3'),
    (dict(num_classes=2), 'has 2 classes, the student 3'),
    (dict(num_classes=0), 'has 0 classes, the student 3'),
    (dict(in_chans=1), 'takes images of 1 channels, the student 3'),
    (dict(pretrained_cfg_overlay=dict(mean=(0.4, 0.5, 0.6))),
     r'was trained on another input range \(mean 0.4 0.5 0.6, std .*--kd-renormalize'),
    (dict(pretrained_cfg_overlay=dict(std=(1., 1., 1.))), 'was trained on another input range'),
    (dict(name='vit_tiny_patch16_224', img_size=64, depth=1, embed_dim=48),
     'refuses images of 3 x 32 x 32 .*choose another --img-size or teacher'),
])
def test_teachers_that_do_not_fit(teacher, text):
    student = make()
    data = data_of(student)
    if teacher.get('name'):
        teacher['pretrained_cfg_overlay'] = dict(mean=data['mean'], std=data['std'])
    with pytest.raises(UserError, match=text) as error:
        open_teacher(make(**teacher), student, data)
    assert '\n' not in str(error.value)


def test_wld_refuses_them_too():
    with pytest.raises(ValueError, match='has 5 classes, the student 3'):
        WLDTask(make(), make(num_classes=5), 1, 1)
    with pytest.raises(ValueError, match='another input range'):
        WLDTask(make(), make(pretrained_cfg_overlay=dict(mean=(0., 0., 0.))), 1, 1)


def test_classes_in_another_order(tmp_path):
    save(tmp_path / 'run', classes=['ant', 'bee', 'cat'])
    student = make()
    open_teacher(str(tmp_path / 'run'), student, data_of(student), class_names=['ant', 'bee', 'cat'])
    with pytest.raises(UserError, match="other classes than those of the data .its 'bee' is 'cat'."):
        open_teacher(str(tmp_path / 'run'), student, data_of(student), class_names=['ant', 'cat', 'bee'])


def test_capsule_lengths_are_no_logits():
    import timm_spinal
    timm_spinal.ensure_registered('test_resnet_xnodr')
    student, capsules = make(), make('test_resnet_xnodr')
    with pytest.raises(UserError, match='its scores are lengths of capsules, not logits; choose another teacher'):
        open_teacher(capsules, student, data_of(student))
    open_teacher(make('test_resnet_xnodr', head_logit_scale=True), student, data_of(student))


def test_renormalised_images_are_what_the_teacher_was_trained_on():
    student, other = make(), make(pretrained_cfg_overlay=dict(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)))
    data = data_of(student, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    teacher = open_teacher(other, student, data, renormalize=True)
    pixels = torch.rand(4, 3, 32, 32)

    def normalise(mean, std):
        return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    with torch.no_grad():
        expected = other(normalise((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    torch.testing.assert_close(teacher(normalise(data['mean'], data['std'])), expected, atol=1e-5, rtol=1e-5)


def test_same_range_changes_no_bit():
    student = make()
    teacher = open_teacher(make(), student, data_of(student))
    with torch.no_grad():
        assert torch.equal(teacher(images()), teacher.model(images()))
    assert not teacher.train().model.training and not any(p.requires_grad for p in teacher.parameters())


def test_grey_images():
    student = make(in_chans=1)
    teacher = open_teacher(make(in_chans=1), student, data_of(student))
    assert teacher(images(1)).shape == (4, 3)


@pytest.mark.parametrize('kind', ['logit', 'wld'])
def test_a_run_with_its_own_mean(tmp_path, kind):
    """Teacher and student share --mean: nothing is converted, whatever timm's mean of the student's name is."""
    student = make()
    data = data_of(student, mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616))
    expected = save(tmp_path / 'run', data=data)
    config = TrainConfig(kd_model_name=str(tmp_path / 'run'), kd_distill_type=kind, smoothing=0.)
    if kind == 'logit':
        task = build_task(config, student, False, torch.device('cpu'), data).eval()
        with torch.no_grad():
            given = F.log_softmax(expected(images()) / 4, -1)
            learnt = F.log_softmax(student(images()) / 4, -1)
        distance = 16 * F.kl_div(learnt, given, reduction='batchmean', log_target=True).item()
        parts = task(images(), torch.zeros(4, dtype=torch.int64))
        assert parts['kd_loss'].item() == pytest.approx(distance, abs=1e-5)
    else:
        teacher = open_teacher(config.kd_model_name, student, data)
        with torch.no_grad():
            assert torch.equal(teacher(images()), expected(images()))


def test_features_of_a_teacher_with_other_classes(tmp_path):
    save(tmp_path / 'run', num_classes=7)
    config = TrainConfig(kd_model_name=str(tmp_path / 'run'), kd_distill_type='feature', smoothing=0.)
    task = build_task(config, make('test_efficientnet'), False, torch.device('cpu'))
    parts = task(images(), torch.zeros(4, dtype=torch.int64))
    assert parts['kd_loss'].item() > 0


def test_a_teacher_is_compiled_with_the_student():
    """The forward that the kind of distillation uses, with the same answers."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32)
    for kind in ('logit', 'wld', 'feature'):
        teacher = open_teacher(timm.create_model('test_vit', num_classes=4), timm.create_model(
            'test_vit', num_classes=4), features=kind == 'feature')
        features = kind == 'feature'
        expected = teacher(images, return_features=features)
        assert teacher.compile_for(TrainConfig(kd_distill_type=kind)) is teacher
        assert not isinstance(teacher.model, torch._dynamo.OptimizedModule)
        teacher.compile_for(TrainConfig(kd_distill_type=kind, torchcompile='eager'))
        assert isinstance(teacher.model, torch._dynamo.OptimizedModule) != features
        assert (teacher._compiled_forward_features is not None) == features
        torch.testing.assert_close(teacher(images, return_features=features), expected)

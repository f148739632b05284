"""Files of weights into models of timm and of ours, by every way that takes a file."""
import copy
import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file

import timm_spinal
from timm_spinal.models.load_weights import create_from_file, load_exactly
from timm_spinal.models.weight_files import MisfitError, WeightsError

from .official_bases import CIFAR_CHANNELS, count, official_logits, official_state

CIFAR10 = dict(channels=CIFAR_CHANNELS, stem=3, convs_in_shortcuts=False, fc='linear')
CIFAR100 = dict(stem=3, classes=100)
OFFICIAL = {  # file as the paper's code saves it, parameters
    'resnet18': (dict(s=0, u=0, layers=(2, 2, 2, 2), classes=1000), 11_689_512),
    'resnet34': (dict(s=0, u=0, classes=1000), 21_797_672),
    'resnet34_sb_s32u1': (dict(s=32, u=1, classes=1000), 8_196_056),
    'resnet34_sb_s48u1d': (dict(s=48, u=1, double=True, classes=1000), 11_786_968),
    'resnet32_cifar': (dict(s=0, u=0, layers=(5, 5, 5), **CIFAR10), 464_154),
    'resnet56_cifar': (dict(s=0, u=0, layers=(9, 9, 9), **CIFAR10), 853_018),
    'resnet32_sb_s16u1_cifar': (dict(s=16, u=1, layers=(5, 5, 5), **CIFAR10), 197_258),
    'resnet56_sb_s16u1d_cifar': (dict(s=16, u=1, double=True, layers=(9, 9, 9), **CIFAR10), 319_226),
    'resnet18_cifar100': (dict(s=0, u=0, layers=(2, 2, 2, 2), **CIFAR100), 11_220_132),
    'resnet34_sb_s16u1_cifar100': (dict(s=16, u=1, **CIFAR100), 6_485_844),
}


def by_checkpoint_path(name, path, **kwargs):
    return timm.create_model(name, checkpoint_path=path, **kwargs)


def by_overlay(name, path, **kwargs):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=path), **kwargs)


def exactly(name, path, **kwargs):
    model = timm.create_model(name, **kwargs)
    model.loaded_weights = load_exactly(model, path)
    return model


def save(path, state):
    torch.save(dict(net_state_dict=state, epoch=3), path)
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize('name', OFFICIAL)
def test_official_checkpoints_load_each_way_as_they_are_saved(name, tmp_path):
    """timm's own names by our ways, ours by timm's too; the network computes what the paper's does."""
    options, params = OFFICIAL[name]
    state = official_state(**options)
    assert count(state) == params
    path = save(tmp_path / 'official.pth', state)
    ways = [create_from_file, exactly]
    if name in timm_spinal.list_models():
        ways += [by_checkpoint_path, by_overlay]
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    expected = official_logits(
        {key: value.double() for key, value in state.items()}, x, options.get('layers', (3, 4, 6, 3)))
    for way in ways:
        torch.testing.assert_close(way(name, path).eval().double()(x), expected, rtol=1e-9, atol=1e-9)
    features = create_from_file(name, path, features_only=True)
    assert len(features.loaded_weights.left_out) == 2 and not features.loaded_weights.new
    assert torch.equal(next(features.parameters()), state['module.conv1.weight'])


def test_official_checkpoints_give_variants_their_backbone(tmp_path):
    state = official_state(s=0, u=0, layers=(5, 5, 5), **CIFAR10)
    path = save(tmp_path / 'official.pth', state)
    assert timm_spinal.ensure_registered('icresnet32_cifar_mlp')
    for name, new in (('icresnet32_cifar', '.ic_weight'), ('icresnet32_cifar_mlp', '.ic_weight attached_head')):
        model = create_from_file(name, path)
        assert torch.equal(model.stages[3][4].conv2.weight, state['module.layer3.4.conv2.weight'])
        found = model.loaded_weights
        assert found.new and all(any(part in key for part in new.split()) for key in found.new)
        assert found.loaded == len(state) - (2 if 'mlp' in name else 0)


def test_mean_and_std_are_those_of_the_official_code():
    """ImageNet's on CIFAR-10, and those of the file where weights of ours say otherwise."""
    for name, mean in (('resnet32_sb_s16u1_cifar', 0.485), ('resnet56_sb_s8u1_cifar', 0.485),
                       ('resnet34_sb_s16u1_cifar100', 0.507), ('resnet32_sb_s16u1_cifar.cifar10', 0.507)):
        assert timm.models.get_pretrained_cfg(name).mean[0] == mean


# ---- what fits, and what does not ------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Files of small models with 7 classes, by name."""
    folder = tmp_path_factory.mktemp('files')
    timm_spinal.ensure_registered('test_resnet_spinal')
    timm_spinal.ensure_registered('ictest_resnet')
    options = {'test_resnet_spinal': dict(head_width=8)}
    found = {}
    for name in ('test_resnet', 'test_vit', 'resnet20_cifar', 'resnet32_cifar', 'test_resnet_spinal', 'ictest_resnet'):
        torch.manual_seed(len(found) + 1)
        found[name] = str(folder / f'{name}.safetensors')
        save_file(timm.create_model(name, num_classes=7, **options.get(name, {})).state_dict(), found[name])
    return found


def state_of(path):
    from timm_spinal.models.weight_files import read_weights
    return read_weights(path)


@pytest.mark.parametrize('name, file, kwargs, left_out, new', [
    ('test_resnet', 'test_resnet', {}, [], []),
    ('test_resnet', 'test_resnet', dict(num_classes=3), ['fc.bias', 'fc.weight'], ['fc.weight', 'fc.bias']),
    ('test_resnet', 'test_resnet', dict(num_classes=0), ['fc.bias', 'fc.weight'], []),
    ('test_resnet', 'test_resnet_spinal', {}, ['attached_head'], ['fc.weight', 'fc.bias']),
    ('test_resnet_spinal', 'test_resnet', dict(head_width=8), ['fc.bias', 'fc.weight'], ['attached_head']),
    ('test_resnet_spinal', 'test_resnet_spinal', dict(head_width=8), [], []),
    ('test_resnet_spinal', 'test_resnet_spinal', dict(head_width=8, num_classes=3), ['attached_head.fc'],
     ['attached_head.fc']),
    ('test_resnet_spinal', 'test_resnet_spinal', dict(head_width=9), ['attached_head'], ['attached_head']),
    ('ictest_resnet', 'test_resnet', {}, [], ['.ic_weight']),
    ('ictest_resnet', 'ictest_resnet', {}, [], []),
    ('resnet20_cifar', 'resnet20_cifar', dict(in_chans=1), [], []),
    ('test_vit', 'test_vit', dict(global_pool='avg'), ['head', 'norm'], ['head', 'fc_norm']),
])
def test_what_fits_is_kept_and_the_rest_is_said(files, name, file, kwargs, left_out, new):
    torch.manual_seed(0)
    model = create_from_file(name, files[file], **dict(dict(num_classes=7), **kwargs))
    found, state, own = model.loaded_weights, state_of(files[file]), model.state_dict()
    for names, wanted in ((found.left_out, left_out), (found.new, new)):
        assert bool(names) == bool(wanted) and all(any(part in key for part in wanted) for key in names)
        assert all(any(part in key for key in names) for part in wanted)
    same = {key for key, value in own.items() if key in state and torch.equal(value, state[key])}
    stem = {'stages.0.conv.weight'} if 'in_chans' in kwargs else set()
    assert own.keys() - set(found.new) - same == stem and found.loaded == len(own) - len(found.new)
    assert state.keys() - own.keys() <= set(found.left_out)
    if stem:
        torch.testing.assert_close(own['stages.0.conv.weight'], state['stages.0.conv.weight'].sum(1, keepdim=True))
    assert model.pretrained_cfg['file'] == files[file] and model.pretrained_cfg['classifier']


@pytest.mark.parametrize('name', ['test_vit', 'resnet20_cifar', 'resnet20_cifar_mlp'])
@pytest.mark.parametrize('chans', [1, 4])
def test_other_channels_than_the_cfg_says(name, chans, tmp_path):
    """timm's rule for them: repeated or cut, and scaled."""
    timm_spinal.ensure_registered(name)
    torch.manual_seed(0)
    source = timm.create_model(name, in_chans=chans)
    save_file(source.state_dict(), tmp_path / 'source')
    stem = f'{source.pretrained_cfg["first_conv"]}.weight'
    weight = source.state_dict()[stem]
    for kwargs in (dict(in_chans=chans), {}):
        model = create_from_file(name, str(tmp_path / 'source'), **kwargs)
        wanted = weight if kwargs else weight.expand(-1, 3, -1, -1) / 3 if chans == 1 else weight[:, :3] * 4 / 3
        torch.testing.assert_close(model.state_dict()[stem], wanted)
        assert model.pretrained_cfg['input_size'][0] == 3 and not model.loaded_weights.new


@pytest.mark.parametrize('name, file, message', [
    ('resnet20_cifar', 'test_resnet', 'they fill 0 of 95 tensors of the backbone; the model also has stages.0.conv.weig'
     '.* and 92 more; size mismatch: stages.0.bn.weight is 32 .* and 16 .*; the file has 41 that .* for: stages.0.con'),
    ('resnet32_cifar', 'resnet20_cifar', 'fill 95 of 155 .* the model also has stages.1.3.conv1.weight'),
    ('resnet20_cifar', 'resnet32_cifar', 'fill 95 of 95 .* the file has 60 that the model .* stages.1.3.bn1.bias'),
    ('test_resnet', 'ictest_resnet', 'fill 75 of 75 .* no place for: .*.ic_weight'),
    ('test_vit', 'test_resnet', 'fill 0 of 78 tensors'),
    ('resnet18', 'test_resnet', 'size mismatch: conv1.weight|the model also has conv1.weight'),
])
@pytest.mark.parametrize('way', [create_from_file, exactly, by_checkpoint_path, by_overlay])
def test_other_networks_are_refused_in_one_line(files, way, name, file, message):
    ours = name in timm_spinal.list_models()
    if not ours and way in (by_checkpoint_path, by_overlay):
        pytest.skip("timm's own model by timm's own way")
    if way is by_checkpoint_path:  # which torch itself refuses
        with pytest.raises(RuntimeError, match='Missing key|Unexpected key'):
            way(name, files[file], num_classes=7)
        return
    with pytest.raises(MisfitError, match='the weights are not of ' + name) as error:
        way(name, files[file], num_classes=7)
    assert '\n' not in str(error.value) and isinstance(error.value, RuntimeError)
    if way is create_from_file:
        assert error.match(message)


@pytest.mark.parametrize('change, message', [
    (lambda s: {'stages.0.conv.weight': s['stages.0.conv.weight']}, 'fill 1 of 95 .* also has stages.0.bn.weight'),
    (lambda s: {k: v for k, v in s.items() if k != 'stages.3.2.bn2.running_var'}, 'fill 94 of 95 .*bn2.running_var$'),
    (lambda s: s | {'stages.1.0.conv1.weight': torch.ones(17, 16, 3, 3)},
     'fill 94 of 95 .* size mismatch: stages.1.0.conv1.weight is 17x16x3x3 in the file and 16x16x3x3 in the model'),
    (lambda s: {k: v for k, v in s.items() if k.startswith('head.')}, 'fill 0 of 95'),
    (lambda s: {f'deep.{k}': v for k, v in s.items()}, 'fill 0 of 95 .* no place for: deep.'),
])
def test_a_file_that_fills_less_than_the_backbone(files, change, message, tmp_path):
    path = save(tmp_path / 'x.pth', change(state_of(files['resnet20_cifar'])))
    for way in (create_from_file, by_overlay):
        with pytest.raises(MisfitError, match=message):
            way('resnet20_cifar', path, num_classes=7)
    with pytest.raises(RuntimeError, match='Missing key|size mismatch'):
        by_checkpoint_path('resnet20_cifar', path, num_classes=7)


def test_what_may_be_missing_or_too_many(files, tmp_path):
    """Counters that old versions of torch did not have, those of tools, and parts that the model does not have."""
    state = state_of(files['resnet20_cifar'])
    old = {k: v for k, v in state.items() if 'num_batches' not in k}
    more = {'stages.1.0.total_ops': torch.zeros(1), 'decoder.weight': torch.ones(3), 'n_averaged': torch.tensor(1)}
    more.update(state)
    for saved, left_out in ((old, 0), (more, 3)):
        model = create_from_file('resnet20_cifar', save(tmp_path / 'x.pth', saved), num_classes=7)
        assert len(model.loaded_weights.left_out) == left_out and not model.loaded_weights.new
        assert all(torch.equal(model.state_dict()[k], v) for k, v in old.items())
    assert exactly('resnet20_cifar', save(tmp_path / 'x.pth', old), num_classes=7).loaded_weights.loaded == len(state)
    with pytest.raises(MisfitError, match='the file has 1 that the model has no place for: decoder.weight'):
        exactly('resnet20_cifar', save(tmp_path / 'x.pth', more), num_classes=7)


def test_exactly_means_the_classifier_too(files):
    with pytest.raises(MisfitError, match='fill 95 of 97 tensors of the model; .* head.fc.weight is 7x64 in the file'):
        exactly('resnet20_cifar', files['resnet20_cifar'], num_classes=3)


def test_collisions_of_another_kind_are_refused(files):
    with pytest.raises(MisfitError, match="collision for which ictest_resnet .* no place, .*; give it the ic_ options"):
        create_from_file('ictest_resnet', files['ictest_resnet'], num_classes=7, ic_mode='pair')


def test_a_packed_head_wants_packed_weights(tmp_path):
    timm_spinal.ensure_registered('test_resnet_xnodr')
    torch.manual_seed(0)
    model = timm.create_model('test_resnet_xnodr', num_classes=3)
    save_file(model.state_dict(), tmp_path / 'float')
    with pytest.raises(ValueError, match='float capsule weights do not fit a packed model'):
        create_from_file('test_resnet_xnodr', str(tmp_path / 'float'), num_classes=3, head_packed=True)
    with pytest.raises(WeightsError, match='float: .*float capsule weights do not fit a packed model'):
        exactly('test_resnet_xnodr', str(tmp_path / 'float'), num_classes=3, head_packed=True)


def test_names_of_others_after_copying_and_pickling(files):
    state = official_state(s=0, u=0, layers=(3, 3, 3), **CIFAR10)
    for again in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        model = again(timm.create_model('resnet20_cifar'))
        model.load_state_dict(dict(model=state))
        assert torch.equal(model.head.fc.bias, state['module.linear.bias'])
    part = torch.nn.ModuleDict(dict(student=timm.create_model('resnet20_cifar')))
    with pytest.raises(RuntimeError, match='Missing key'):
        part.load_state_dict({f'student.{k}': v for k, v in state.items()})


def test_loading_leaves_torch_as_it_was(files):
    before = torch.nn.Module.load_state_dict
    for name in ('test_resnet', 'resnet32_cifar'):
        try:
            create_from_file(name, files['test_resnet'], num_classes=7)
        except MisfitError:
            continue
    assert torch.nn.Module.load_state_dict is before

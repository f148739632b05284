import pytest

from timm_spinal.compare.options import FrozenConfig, as_train_config, check_frozen, parse_seeds
from timm_spinal.errors import UserError
from timm_spinal.training.parser import parse_config


def test_seeds():
    assert parse_seeds('3') == [0, 1, 2]
    assert parse_seeds('3,7,11') == [3, 7, 11]
    assert parse_seeds([5, 6]) == [5, 6]
    assert parse_seeds('4,') == [4]


@pytest.mark.parametrize('text, message', [
    ('0', 'an empty list of seeds'), ('', 'an empty list of seeds'), ([], 'an empty list of seeds'),
    ('-1,2', 'negative'), ('1,1', 'given twice'), ('many', 'not a number of seeds'),
    ('4294967296', 'too large; give at most 1000 seeds'), ('1,4294967296', 'each below 4294967296'),
])
def test_bad_seeds(text, message):
    with pytest.raises(UserError, match=message):
        parse_seeds(text)


@pytest.mark.parametrize('given, size, batch', [(0, 50000, 512), (0, 1600, 100), (0, 5, 1), (64, 1600, 64)])
def test_small_sets_get_smaller_batches_unless_given(given, size, batch):
    assert FrozenConfig(head_batch_size=given).recipe(size).batch_size == batch


def test_flags_of_the_trainer_reach_the_data():
    config = parse_config(['--backbone', 'resnet18', '--dataset', 'digits', '--img-size', '32', '--lr', '0.01',
                           '--heads', 'linear,mlp', '--hflip', '0'], FrozenConfig)
    train = as_train_config(config)
    assert (train.model, train.dataset, train.img_size, train.hflip) == ('resnet18', 'digits', 32, 0.)
    assert config.lr == 0.01 and train.lr is None
    assert as_train_config(config, seed=7).seed == 7


def test_a_backbone_is_needed():
    with pytest.raises(UserError, match='no backbone'):
        check_frozen(FrozenConfig())


@pytest.mark.parametrize('changes, message', [
    (dict(dataset='multimnist'), 'two classes each; .* use --sweep'),
    (dict(mixup=0.2), '--mixup: has no effect'), (dict(freeze='bn'), '--freeze: has no effect'),
    (dict(model='resnet18'), '--model: .*the model is the --backbone'), (dict(drop=0.1), '--drop'),
])
def test_options_without_effect_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        check_frozen(FrozenConfig(backbone='resnet18', **changes))

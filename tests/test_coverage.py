import csv

import pytest
import timm
from torch import nn

import timm_spinal
from timm_spinal.coverage import (
    Coverage,
    check_head,
    classifier_kind,
    cover_model,
    main,
    print_table,
    timm_names,
)
from timm_spinal.errors import UserError

# one of every kind of classifier and of every way in which timm's families differ
ACCEPTED = [
    ('resnet10t', 'linear'),
    ('vit_tiny_patch16_224', 'linear'),
    ('efficientvit_m0', 'linear'),  # BatchNorm in front of the linear goes with it
    ('levit_384_s8', 'linear'),  # a second classifier that its cfg does not name
    ('naflexvit_base_patch16_gap', 'linear'),  # masks go to forward_head
    ('deit_tiny_distilled_patch16_224', 'several'),  # average of two
    ('efficientvim_m1', 'several'),  # stages of different widths
    ('crossvit_9_240', 'several'),
    ('dpn48b', 'conv'),
    ('vit_base_patch16_clip_224', 'linear'),
    ('vit_tiny_r_s16_p8_224', 'linear'),
]


@pytest.mark.parametrize('name, kind', ACCEPTED)
def test_accepted(name, kind):
    row = cover_model(name, 'pspinal')
    assert (row.classifier, row.outcome, row.reason) == (kind, 'accepted', '')


def test_refused_with_one_sentence_that_says_why():
    row = cover_model('mobilenetv5_300m_enc', 'spinal')
    assert (row.outcome, row.classifier) == ('refused', 'none')
    assert 'has no reset_classifier' in row.reason and 'pass what timm.create_model returns' in row.reason


def test_model_without_classes_has_no_classifier():
    assert classifier_kind(timm.create_model('resnet10t', num_classes=0, device='meta')) == 'none'


def test_lost_backbone_keys_are_noticed():
    model = timm.create_model('resnet10t', device='meta')

    def reset_classifier(self, num_classes, global_pool=None):
        del self.layer4
        type(model).__base__.reset_classifier(self, num_classes)

    model.__class__ = type('Forgetful', (type(model),), dict(reset_classifier=reset_classifier))
    with pytest.raises(AssertionError, match='lost backbone keys: .*layer4'):
        check_head(model, 'spinal')


def test_names_are_timms_own():
    names = timm_names('resnet18*')
    assert 'resnet18' in names and 'resnet18_spinal' not in names
    assert not set(timm_names()) & set(timm_spinal.list_models())


def test_main_prints_families_and_totals(tmp_path, capsys):
    path = tmp_path / 'coverage.csv'
    assert main(['resnet1[04]t', '--head', 'mlp', '--jobs', '1', '--csv', str(path)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1].split() == ['resnet', '2', '2', '2', '0', '0']
    assert out[-1] == ('accepted by classifier: one nn.Linear 2/2, several 0/0, 1x1 conv 0/0, none 0/0; '
                       'with a classifier 100.0 % of 2')
    assert [row['model'] for row in csv.DictReader(path.open())] == ['resnet10t', 'resnet14t']


def test_table_groups_models_by_reason(capsys):
    print_table([
        Coverage('a1', 'a', 'linear', 'refused', 'no'),
        Coverage('a2', 'a', 'linear', 'refused', 'no'),
        Coverage('b1', 'b', 'none', 'accepted'),
    ])
    out = capsys.readouterr().out
    assert 'refused (classifier: linear): a1, a2\n    no\n' in out
    assert 'one nn.Linear 0/2' in out and '0.0 % of 2' in out


def test_unmatched_filter():
    with pytest.raises(UserError, match="No model of timm matches 'nosuchnet'"):
        main(['nosuchnet'])


def test_plain_module_is_refused():
    with pytest.raises(ValueError, match='cannot take a head'):
        timm_spinal.attach_head(nn.Linear(2, 2), 'spinal')

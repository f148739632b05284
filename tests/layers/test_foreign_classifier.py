"""Heads in classifiers of other libraries, which take any module with certain attributes for a head."""
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from timm_spinal.layers import HEADS, create_head

SIZES = {'NCHW': (2, 16, 6, 6), 'NHWC': (2, 6, 6, 16), 'NLC': (2, 37, 16)}
MAP_HEADS = [name for name, cls in HEADS.items() if cls.needs_feature_map]


class Encoder(nn.Module):
    """Gives features of one format, whatever it sees."""

    def __init__(self, output_fmt):
        super().__init__()
        self.traits = SimpleNamespace(output_fmt=output_fmt)
        self.output_dim = 16

    def forward(self, x):
        return torch.randn(SIZES[self.traits.output_fmt], generator=torch.Generator().manual_seed(0), dtype=x.dtype)


class Classifier(nn.Module):
    """An encoder and a head, joined as in timme."""

    def __init__(self, encoder, head):
        super().__init__()
        assert encoder.traits.output_fmt in getattr(head, 'accepted_fmts', ()), 'the head reads another format'
        self.encoder, self.head = encoder, head

    num_classes = property(lambda self: self.head.num_classes)
    head_hidden_size = property(lambda self: self.head.pre_logits_dim)

    def reset_classifier(self, num_classes, global_pool=None):
        self.head.reset(num_classes, pool_type=global_pool)

    def get_classifier(self):
        return self.head.get_classifier()

    def forward_head(self, x, pre_logits=False):
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x):
        return self.forward_head(self.encoder(x))


def classifiers():
    """Ours, and that of timme where it is installed."""
    yield Classifier
    try:
        from timme.arch.classifier import ImageClassifier
    except ImportError:
        return
    yield ImageClassifier


@pytest.mark.parametrize('cls', classifiers(), ids=lambda cls: cls.__module__)
@pytest.mark.parametrize('name, fmt', [
    *((name, fmt) for name in MAP_HEADS for fmt in ('NCHW', 'NHWC')), ('attn', 'NLC'), ('mldecoder', 'NLC')])
def test_a_head_fits_a_classifier_that_asks_for_these_names(cls, name, fmt):
    torch.manual_seed(0)
    prefix = dict(num_prefix_tokens=1) if fmt == 'NLC' else {}
    model = cls(Encoder(fmt), create_head(name, 16, 5, input_fmt=fmt, **prefix).double()).double().eval()
    x = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
    features = model.encoder(x)
    assert model(x).shape == (2, 5) and model.num_classes == 5
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    kept = {key: value.clone() for key, value in model.head.hidden.state_dict().items()}
    model.reset_classifier(3, 'avg')
    assert model(x).shape == (2, 3) and model(x).dtype == torch.float64 and not model.get_classifier().training
    assert all(torch.equal(value, kept[key]) for key, value in model.head.hidden.state_dict().items())
    assert model.get_classifier() is model.head.fc
    with pytest.raises(AssertionError):
        cls(Encoder('NLC' if fmt != 'NLC' else 'NCHW'), model.head)


@pytest.mark.parametrize('name', sorted(set(HEADS) - set(MAP_HEADS)))
def test_heads_of_a_pooled_vector_accept_no_map(name):
    head = create_head(name, 16, 5)
    assert head.accepted_fmts == () and head.pre_logits_dim == head.hidden_size
    head.reset(4, pool_type='avg')
    assert head.eval()(torch.zeros(2, 16)).shape == (2, 4)
    assert create_head('caps', 16, 5, primary='vector').accepted_fmts == ()
    torch.jit.script(head)

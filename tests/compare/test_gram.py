import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

from timm_spinal.cli import main as cli
from timm_spinal.compare.gram import draw_gram, grams, shared_bases
from timm_spinal.errors import UserError


def make(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('resnet32_sb_s16u1_cifar', num_classes=5, depth=2, **kwargs)


def test_orthonormal_filters_give_the_identity():
    for name, gram in grams(make(sb_double=True)).items():
        torch.testing.assert_close(gram.matrix, torch.eye(len(gram.matrix)), atol=1e-5, rtol=0)
        assert gram.norm == pytest.approx(1.) and gram.greatest < 1e-5, name
    assert [len(gram.matrix) for gram in grams(make(sb_double=True)).values()] == [32, 64, 128]


def test_norms_and_cosines_by_hand():
    model = make(sb_rank=2)
    with torch.no_grad():
        basis = model.get_parameter('stages.1.basis')
        basis.zero_()
        basis[0].view(-1)[0] = 2.
        basis[1].view(-1)[:2] = torch.tensor([3., 4.])
    gram = next(iter(grams(model).values()))
    assert gram.matrix.tolist() == [[4., 6.], [6., 25.]]
    assert (gram.norm, gram.cosine, gram.greatest) == pytest.approx((3.5, 0.6, 0.6))


@pytest.mark.slow
def test_filters_of_two_sizes_are_two_matrices(tmp_path):
    model = timm.create_model('resnet50_sbpp', layers=(2, 2, 2, 2))
    assert [len(gram.matrix) for gram in grams(model).values()] == [64, 256, 128, 512, 256, 1024, 512, 2048]
    draw_gram(tmp_path / 'gram.png', {'wide': model, 'narrow': make()})
    assert Image.open(tmp_path / 'gram.png').width > 1000


def test_command(tmp_path, capsys):
    for variant in ('sb', 'sb_ortho'):
        (tmp_path / variant).mkdir()
        save_for_hf(make(), tmp_path / variant / 'seed-0', safe_serialization=True)
    png = tmp_path / 'gram.png'
    runs = [str(tmp_path / variant / 'seed-0') for variant in ('sb', 'sb_ortho')]
    assert cli(['gram', *runs, '--output', str(png)]) == 0
    out = capsys.readouterr().out
    assert '| sb_ortho/seed-0 | stages.3, 576 numbers | 64 | 1.000 | 0.0000 | 0.0000 |' in out
    assert Image.open(png).height > 300


def test_refusals(tmp_path, capsys):
    assert cli(['gram', str(tmp_path), '--output', str(tmp_path / 'a.png')]) == 2
    assert 'has no config.json; give the folder of a finished run' in capsys.readouterr().err
    assert cli(['gram', str(tmp_path), '--output', 'a.jpg']) == 2
    assert 'name a .png file' in capsys.readouterr().err
    with pytest.raises(UserError, match='SmallResNet: it has no shared filters'):
        shared_bases(timm.create_model('resnet32_cifar', device='meta'))
    with pytest.raises(UserError, match='has no shared filters'):
        shared_bases(make(sb_rank=0, sb_unique=4))
    assert not list(tmp_path.glob('*.png'))

from timm_spinal.bench import train as bench
from timm_spinal.cli import main


def test_both_sides_run_and_the_line_says_so(capsys):
    assert main(['bench', 'train', '--model', 'test_efficientnet', '--img-size', '32', '-b', '4', '--images', '8',
                 '-j', '0', '--rounds', '1']) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith('test_efficientnet at 32 px, batch 4, 0 workers: ') and "of timm's images/s" in line


def test_bad_size(capsys):
    assert main(['bench', 'train', '--images', '2']) == 2


def test_both_sides_learn_the_same_task(tmp_path):
    """Same data and recipe: after some epochs both losses have fallen."""
    bench.write_images(tmp_path / 'images', 8, 40)
    assert len(list((tmp_path / 'images' / 'train').rglob('*.jpg'))) == 8
    assert len(list((tmp_path / 'images' / 'train').iterdir())) == bench.CLASSES

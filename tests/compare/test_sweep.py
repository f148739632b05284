import csv
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from timm_spinal.compare.cli import main
from timm_spinal.compare.jobs import Task, job_environment
from timm_spinal.compare.sweep import check_folder
from timm_spinal.compare.sweep_file import read_sweep, size_control
from timm_spinal.errors import UserError
from timm_spinal.training.config import TrainConfig, to_yaml

SHARED = dict(
    dataset='digits', epochs=1, batch_size=128, workers=0, in_chans=1, img_size=32, opt='adamw', lr=0.003,
    warmup_epochs=0, no_aug=True, crop_pct=1.)


def write(path, **changes):
    raw = dict(
        output=str(path.parent / 'out'), seeds=1, shared=SHARED,
        variants=dict(linear=dict(model='test_resnet_linear'),
                      spinal=dict(model='test_resnet_spinal', model_kwargs=dict(head_width=8))))
    raw.update(changes)
    path.write_text(yaml.safe_dump({k: v for k, v in raw.items() if v is not None}, sort_keys=False))
    return path


def test_configs_are_shared_options_and_those_of_the_variant(tmp_path):
    sweep = read_sweep(write(tmp_path / 's.yaml', shared=dict(SHARED, model_kwargs=dict(head_dropout=0.1))))
    assert sweep.control == 'linear' and sweep.seeds == [0] and sweep.output == tmp_path / 'out'
    moved = read_sweep(tmp_path / 's.yaml', 'elsewhere', 'my/data')
    assert {c.data_dir for c in moved.configs.values()} == {'my/data'} and moved.output == Path('elsewhere')
    assert sweep.configs['spinal'].data_dir == ''
    spinal = sweep.configs['spinal']
    assert (spinal.model, spinal.lr, spinal.img_size) == ('test_resnet_spinal', 0.003, 32)
    assert spinal.model_kwargs == dict(head_dropout=0.1, head_width=8)


def test_controls_of_equal_size(tmp_path):
    variants = dict(spinal=dict(model='test_resnet_spinal', model_kwargs=dict(head_width=8)), **{'mlp=spinal': None})
    sweep = read_sweep(write(tmp_path / 's.yaml', variants=variants))
    config = size_control(sweep, 'mlp=spinal', 10)
    assert config.model == 'test_resnet_mlp' and sweep.sized_as == {'mlp=spinal': 'spinal'}
    # F = 96: spinal of width 8 has 8 * 49 + 3 * 8 * 57 + 4 * 16 + 330 = 2154 parameters; a unit of the MLP has 109
    assert config.model_kwargs == dict(head_width=round((2154 - 10) / 109))


@pytest.mark.parametrize('changes, message', [
    (dict(shared=dict(SHARED, epoch=3)), "shared: unknown key 'epoch'; did you mean epochs"),
    (dict(variants=dict(a=dict(model='test_resnet', lrr=1))), "variant a: unknown key 'lrr'"),
    (dict(variants=dict(a=dict(model='test_resnet', lr='fast'))), "variant a: lr: 'fast' is not a finite number"),
    (dict(variants=dict(a=dict(model='test_resnett'))), "unknown model 'test_resnett'"),
    (dict(variants=dict(a=dict(model='test_resnet', seed=3))), 'seed is set for every run by the sweep'),
    (dict(variants={}), 'no variants'),
    (dict(variants={'mlp=spinal': None}), 'takes its size from spinal, which is not among the variants'),
    (dict(variants={'a b': dict(model='test_resnet'), 'a-b': dict(model='test_resnet')}), 'would share a folder'),
    (dict(variants={'..': dict(model='test_resnet')}), "variant '..': is a path, not a name"),
    (dict(seeds=[]), 'empty list of seeds'),
    (dict(seeds=[1, 1]), 'given twice'),
    (dict(control='spinall'), "control 'spinall' is not among the variants"),
    (dict(seed=3), "unknown key 'seed'; did you mean seeds"),
    (dict(tune=dict(lr=0.1)), 'tune: write lists'),
    (dict(tune=dict(lrr=[0.1])), "tune: unknown key 'lrr'"),
    (dict(variants=dict(b=dict(model='test_resnet', kd_model_name='variant:a', kd_distill_type='wld'),
                        a=dict(model='test_resnet'))), 'its teacher a is not among the variants before it'),
    (dict(variants=dict(a=dict(model='test_resnet', kd_model_name='variant:a'))), 'its teacher a is not among'),
    (dict(tune=dict(lr=[0.1]), variants=dict(
        a=dict(model='test_resnet'), b=dict(model='test_resnet', kd_model_name='variant:a'))), 'tune: variant b has a'),
])
def test_bad_files_are_refused_before_anything_runs(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        main(['--sweep', str(write(tmp_path / 's.yaml', **changes))])
    assert not (tmp_path / 'out').exists()


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match='No such file.*YAML file'):
        main(['--sweep', str(tmp_path / 'none.yaml')])
    (tmp_path / 's.yaml').write_text('a: [')
    with pytest.raises(UserError, match='not valid YAML'):
        main(['--sweep', str(tmp_path / 's.yaml')])
    with pytest.raises(UserError, match='--jobs: must be at least 1, got 0'):
        main(['--sweep', str(write(tmp_path / 's.yaml')), '--jobs', '0'])


def test_data_without_test_split_are_refused(tmp_path):
    from tests.training.images import make_split
    make_split(tmp_path / 'all')
    file = write(tmp_path / 's.yaml', shared=dict(data_dir=str(tmp_path / 'all')))
    with pytest.raises(UserError, match='no test split, which a sweep needs'):
        main(['--sweep', str(file)])


def test_a_folder_of_other_settings_is_refused(tmp_path):
    task = Task('a', TrainConfig(output=str(tmp_path), experiment='seed-0', lr=0.2))
    (tmp_path / 'seed-0').mkdir()
    (tmp_path / 'seed-0' / 'args.yaml').write_text(to_yaml(TrainConfig(lr=0.2, num_classes=10, workers=9)))
    check_folder(task)
    (tmp_path / 'seed-0' / 'args.yaml').write_text(to_yaml(TrainConfig(lr=0.1)))
    with pytest.raises(UserError, match='other settings: lr .0.1 -> 0.2.; remove it'):
        check_folder(task)


def test_a_finished_run_is_known_by_any_name_of_its_data(tmp_path, monkeypatch):
    """The relative names in ``args.yaml`` start from the folder of that run, which its checkpoints remember."""
    folder = tmp_path / 'seed-0'
    (folder / 'last' / 'step-00000001').mkdir(parents=True)
    (folder / 'args.yaml').write_text(to_yaml(TrainConfig(data_dir='data')))
    for place in ('a', 'b'):
        (tmp_path / place / 'data').mkdir(parents=True)
    (folder / 'last' / 'step-00000001' / 'state.json').write_text(json.dumps(dict(cwd=str(tmp_path / 'a'))))
    monkeypatch.chdir(tmp_path / 'b')
    task = Task('a', TrainConfig(output=str(tmp_path), experiment='seed-0', data_dir='../a/data'))
    check_folder(task)
    task.config.data_dir = str(tmp_path / 'a' / 'data')
    check_folder(task)
    task.config.data_dir = 'data'
    with pytest.raises(UserError, match='other settings: data_dir'):
        check_folder(task)


def test_a_folder_of_another_precision_is_refused(tmp_path, monkeypatch):
    task = Task('a', TrainConfig(output=str(tmp_path), experiment='seed-0'))
    (tmp_path / 'seed-0').mkdir()
    (tmp_path / 'seed-0' / 'args.yaml').write_text(to_yaml(TrainConfig(mixed_precision='bf16')))
    with pytest.raises(UserError, match="other settings: mixed_precision .'bf16' -> 'no'."):
        check_folder(task)
    monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', 'bf16')
    check_folder(task)


def test_jobs_share_cores_and_have_a_gpu_each(monkeypatch):
    for name in ('OMP_NUM_THREADS', 'CUDA_VISIBLE_DEVICES'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr('os.cpu_count', lambda: 8)
    assert job_environment(3, 4, 2)['OMP_NUM_THREADS'] == '2'
    assert job_environment(3, 4, 2)['CUDA_VISIBLE_DEVICES'] == '1'
    assert 'CUDA_VISIBLE_DEVICES' not in job_environment(0, 1, 2) and 'OMP_NUM_THREADS' not in job_environment(0, 1, 2)


def run_and_read(file, *flags):
    code = main(['--sweep', str(file), '--jobs', '2', *flags])
    out = file.parent / 'out'
    results = {p.parent.parent.name: p.stat().st_mtime_ns for p in out.glob('runs/*/seed-0/result.json')}
    return code, results, (out / 'report.md').read_text()


@pytest.mark.slow
def test_finished_runs_are_kept_and_a_failed_one_does_not_stop_the_others(tmp_path, capfd):
    variants = dict(
        broken=dict(model='test_resnet_spinal', model_kwargs=dict(head_width=8), initial_checkpoint='/nowhere.pth'),
        linear=dict(model='test_resnet_linear'))
    code, first, report = run_and_read(write(tmp_path / 's.yaml', variants=variants, control='linear'))
    assert code == 1 and set(first) == {'linear'}
    assert 'broken, seed-0: failed: ' in capfd.readouterr().out
    assert '1 of 2 runs are not in these numbers: `broken` seed 0 failed' in report and 'nowhere.pth' in report

    variants['broken'].pop('initial_checkpoint')
    code, second, report = run_and_read(
        write(tmp_path / 's.yaml', variants=variants, control='linear'), '--per-class', '--calibration')
    assert code == 0 and set(second) == {'linear', 'broken'} and second['linear'] == first['linear']
    assert '1 of 2 runs are finished already' in capfd.readouterr().out
    assert 'Fewer than 3 seeds, so there is no interval' in report and 'not in these numbers' not in report
    result = json.loads((tmp_path / 'out' / 'runs' / 'linear' / 'seed-0' / 'result.json').read_text())
    assert result['test_images'] == 359 and result['eval_size'] < 200
    with (tmp_path / 'out' / 'per_class.csv').open() as f:
        tops = [float(row['linear']) for row in csv.DictReader(f)]
    kept = load_file(tmp_path / 'out' / 'runs' / 'linear' / 'seed-0' / 'predictions.safetensors')
    assert 100 * (kept['prediction'] == kept['target']).mean() == pytest.approx(result['test_top1'], abs=1e-4)
    assert np.average(tops, weights=np.bincount(kept['target'])) == pytest.approx(result['test_top1'], abs=0.02)
    assert 'Expected calibration error' in report and (tmp_path / 'out' / 'calibration.png').stat().st_size > 1000
    assert '](runs/linear/seed-0/confusion.png)' in report and '](runs/broken/seed-0/worst.png)' in report

    runs = [str(p.parent) for p in sorted((tmp_path / 'out').glob('runs/*/seed-0/result.json'))]
    assert main(['--report', *runs, '--output', str(tmp_path / 'again')]) == 0
    comparison = json.loads((tmp_path / 'again' / 'compare.json').read_text())
    assert [v.partition(',')[0] for v in comparison['variants']] == ['test_resnet_spinal', 'test_resnet_linear']


@pytest.mark.slow
def test_pairs_of_digits_and_binary_weights_are_reported(tmp_path):
    from tests.training.images import make_mnist
    shared = dict(
        dataset='multimnist', data_dir=str(make_mnist(tmp_path / 'mnist')), epochs=1, batch_size=10, workers=0,
        warmup_epochs=0, in_chans=1, img_size=36, model_kwargs=dict(head_capsules=8), loss='margin', smoothing=0.,
        opt='adam', lr=0.01)
    variants = {head: dict(model=f'test_efficientnet_{head}') for head in ('caps', 'xnodr')}
    code, runs, report = run_and_read(write(tmp_path / 's.yaml', shared=shared, variants=variants, control='caps'))
    assert code == 0 and set(runs) == {'caps', 'xnodr'}
    result = json.loads((tmp_path / 'out' / 'runs' / 'xnodr' / 'seed-0' / 'result.json').read_text())
    header, _, _, row = report.partition('## Results\n\n')[2].splitlines()[:4]
    assert header.startswith('| variant | seeds | test exact pairs, % (95 % interval) |') and 'top-1' not in report
    assert 'validation exact pairs, % | signs changed, % |' in header
    assert f'| {result["test_exact"]:.2f} (no interval) |' in row and f'| {result["sign_flips"]:.2f} |' in row
    assert 'test_exact' in (tmp_path / 'out' / 'results.csv').read_text()


@pytest.mark.slow
def test_teacher_is_the_run_of_the_same_seed(tmp_path):
    """Two at a time: the student waits for its teacher, though there is room for both."""
    variants = dict(
        plain=dict(model='test_resnet'),
        wld=dict(model='test_resnet', kd_model_name='variant:plain', kd_distill_type='wld'))
    assert run_and_read(write(tmp_path / 's.yaml', variants=variants))[0] == 0
    plain, wld = (tmp_path / 'out' / 'runs' / name / 'seed-0' for name in ('plain', 'wld'))
    args = yaml.safe_load((wld / 'args.yaml').read_text())
    assert args['kd_model_name'] == str(plain)
    assert (plain / 'result.json').stat().st_mtime_ns < (wld / 'args.yaml').stat().st_mtime_ns
    assert float(next(csv.DictReader((wld / 'summary.csv').open()))['train_kd_loss']) > 0


@pytest.mark.slow
def test_tuning_never_reads_the_test_split(tmp_path):
    file = write(tmp_path / 's.yaml', variants=dict(linear=dict(model='test_resnet_linear')),
                 tune=dict(lr=[1e-9, 0.003]))
    assert run_and_read(file)[0] == 0
    points = [json.loads((tmp_path / 'out' / 'tune' / 'linear' / f'point-{i}' / 'result.json').read_text())
              for i in (0, 1)]
    assert not any('test_top1' in p for p in points) and points[1]['top1'] > points[0]['top1']
    args = yaml.safe_load((tmp_path / 'out' / 'runs' / 'linear' / 'seed-0' / 'args.yaml').read_text())
    assert args['lr'] == 0.003
    assert '| linear | 0.003 |' in Path(tmp_path / 'out' / 'report.md').read_text()

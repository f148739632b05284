"""Makes docs/results/regression.csv: both networks on the four functions, five seeds, at 100 and 200 epochs.

    python -m tests.docs.regression

Some 10 minutes on an idle core. With the constant learning rate, 100 epochs of a run of 200 are a run of 100.
"""
import csv
import statistics
import subprocess
import tempfile

from timm_spinal.training.config import TrainConfig
from timm_spinal.training.parser import parse_config
from timm_spinal.training.regression import FUNCTIONS, NOISE, synthetic
from timm_spinal.training.report import hardware
from timm_spinal.training.train import train

from .generate import ROOT

CONFIG = ROOT / 'configs' / 'regression_spinal_regression.yaml'
MODELS = {'plain': ('spinal_regression_plain', 22_001), 'spinal': ('spinal_regression', 14_301)}
SEEDS = range(5)
# least loss of the last training batch over the epochs, x 1e-3, at 100 and 200 epochs (docs/papers/spinalnet.md)
REPORTED = {
    'sum': dict(plain=(1.178, 0.887), spinal=(1.007, 0.855)),
    'sin_sum': dict(plain=(1.918, 1.086), spinal=(1.912, 1.219)),
    'product': dict(plain=(3.875, 3.875), spinal=(3.966, 2.217)),
    'sin_product': dict(plain=(3.403, 1.554), spinal=(0.910, 0.910)),
}
T_95 = 2.776  # of Student's t distribution with 4 degrees of freedom


def run(function: str, model: str, seed: int) -> list[float]:
    """Validation MSE after 100 and 200 epochs."""
    with tempfile.TemporaryDirectory() as folder:
        config: TrainConfig = parse_config([
            '--config', str(CONFIG), '--dataset', f'regression/{function}', '--model', model, '--seed', str(seed),
            '--output', folder, '--experiment', 'run', '--log-interval', '100000'])
        train(config)
        with open(f'{folder}/run/summary.csv', newline='', encoding='utf-8') as file:
            return [float(row['eval_mse']) for row in csv.DictReader(file) if row['eval_mse']]


def main() -> None:
    import torch
    commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True).stdout.strip()
    shared = dict(seeds='', uncertainty='', spread='', reported='', difference='', low='', high='', epochs='', note='',
                  hardware='', parameters='', command='python -m tests.docs.regression', commit=commit,
                  measure='MSE x 1,000')
    rows = [dict(shared, row='noise', what='noise', function='', data='', value=f'{1e3 * NOISE ** 2 / 12:.2f}')]
    for function in FUNCTIONS:
        variance = float(synthetic(function, 'validation')[1].var(correction=0))
        rows.append(dict(shared, row=f'mean/{function}', what='mean of the targets', function=function,
                         data='held-out 1,000', value=f'{1e3 * variance:.0f}'))
    for function in FUNCTIONS:
        errors = {name: [run(function, model, seed) for seed in SEEDS] for name, (model, _) in MODELS.items()}
        for i, epochs in enumerate((100, 200)):
            for name, (model, params) in MODELS.items():
                values = [1e3 * both[i] for both in errors[name]]
                row = dict(
                    row=f'{function}/{epochs}/{name}', what=model, function=function.replace('_', ' of the '),
                    parameters=f'{params:,}', data='1,000 training numbers, held-out 1,000', epochs=epochs,
                    seeds='0 to 4', measure='MSE x 1,000 on held-out numbers', value=f'{statistics.mean(values):.2f}',
                    spread=f'{T_95 * statistics.stdev(values) / len(values) ** 0.5:.2f}',
                    uncertainty='95 % interval over seeds', reported=f'{REPORTED[function][name][i]:.3f}',
                    difference='', low='', high='', hardware=f'{hardware(torch.device("cpu"), 1)}',
                    command='python -m tests.docs.regression', commit=commit, note='')
                if name == 'spinal':
                    paired = [1e3 * (s[i] - p[i]) for s, p in zip(errors['spinal'], errors['plain'])]
                    half = T_95 * statistics.stdev(paired) / len(paired) ** 0.5
                    mean = statistics.mean(paired)
                    row.update(difference=f'{mean:+.2f}', low=f'{mean - half:+.2f}', high=f'{mean + half:+.2f}')
                rows.append(row)
    with open(ROOT / 'docs' / 'results' / 'regression.csv', 'w', newline='', encoding='utf-8') as file:
        table = csv.DictWriter(file, list(rows[-1]), lineterminator='\n')
        table.writeheader()
        table.writerows(rows)


if __name__ == '__main__':
    main()

"""Runs timm's model tests on ours: see the package's docstring."""

import argparse
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import List, Optional

import timm_spinal

from .representatives import representatives

TIMM_VERSION = '1.0.31'
HERE = Path(__file__).resolve().parent


def cache_dir() -> Path:
    """Where timm's sdist is kept: ``$TIMM_SUITE_CACHE``, or the user's cache."""
    default = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'timm_spinal'
    return Path(os.environ.get('TIMM_SUITE_CACHE') or default)


def timm_source(cache: Path) -> Path:
    """The unpacked sdist of timm with its tests, fetched by pip where it is not there yet."""
    source = cache / f'timm-{TIMM_VERSION}'
    if not (source / 'tests' / 'test_models.py').exists():
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run([
            sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', 'timm',
            '--dest', str(cache), f'timm=={TIMM_VERSION}',
        ], check=True)
        with tarfile.open(cache / f'timm-{TIMM_VERSION}.tar.gz') as archive:
            # Python 3.11.3 and older have no filters
            archive.extractall(cache, **(dict(filter='data') if hasattr(tarfile, 'data_filter') else {}))
    return source


def run_suite(models: List[str], pytest_args: List[str]) -> int:
    """Run timm's ``tests/test_models.py`` on the given models; returns pytest's exit code."""
    source = timm_source(cache_dir())
    env = dict(os.environ)
    env['TIMM_SUITE_MODELS'] = ' '.join(models)  # read by the plugin
    env['PYTHONPATH'] = os.pathsep.join(filter(None, [str(HERE), env.get('PYTHONPATH', '')]))
    env.setdefault('HF_HUB_OFFLINE', '1')
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'timm_suite_plugin', '-p', 'no:cacheprovider']
    return subprocess.run([*command, 'tests/test_models.py', *pytest_args], cwd=source, env=env).returncode


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        prog='python -m tests.timm_suite', description=__doc__, epilog='Further arguments go to pytest.')
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument('--models', nargs='+', metavar='NAME', help='registered names')
    chosen.add_argument('--representative', action='store_true', help='one of every family and head (default)')
    chosen.add_argument('--all', action='store_true', help='every model that this package registers')
    args, pytest_args = parser.parse_known_args(argv)
    known = timm_spinal.list_models()
    models = args.models or (known if args.all else representatives())
    unknown = sorted(set(models) - set(known))
    if unknown:
        parser.error(f'not registered by timm_spinal: {", ".join(unknown)}')
    return run_suite(models, pytest_args)


if __name__ == '__main__':
    sys.exit(main())

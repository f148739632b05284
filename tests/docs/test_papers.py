"""References from code, tests and configs to docs/papers name pages and sections that exist."""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ('timm_spinal', 'tests', 'configs', 'hub_cards')
SUFFIXES = {'.py', '.c', '.h', '.yaml', '.md'}
GAP = r'(?:[ \t]*\n[ \t]*(?:[#*][ \t]*)?|[ \t]+)'  # a space, or a line break in a comment
NUMBER = r'\d+(?:\.\d+)?'
REFERENCE = re.compile(
    rf'docs/papers/(\w+)\.md(?:,{GAP}sections?{GAP}({NUMBER}(?:(?:,{GAP}|{GAP}and{GAP}|{GAP}to{GAP}){NUMBER})*))?')


def references():
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob('*')):
            if path.suffix in SUFFIXES and path != Path(__file__):
                for page, sections in REFERENCE.findall(path.read_text(encoding='utf-8')):
                    yield path.relative_to(ROOT).as_posix(), page, re.findall(NUMBER, sections)


def test_every_page_and_section_exists():
    if not (ROOT / 'docs/papers').is_dir():
        pytest.skip('docs/papers is not in this tree')
    known = {path.stem: set(re.findall(r'^##+ ([\d.]+?)\.? ', path.read_text(encoding='utf-8'), re.M))
             for path in (ROOT / 'docs/papers').glob('*.md')}
    found = list(references())
    assert {page for _, page, _ in found} == set(known) and len(found) > 100
    assert not [(path, page, s) for path, page, sections in found for s in sections if s not in known.get(page, ())]

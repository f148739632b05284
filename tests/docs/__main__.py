"""Writes the generated pages and blocks: see the package's docstring."""
import sys

from .generate import ROOT, TemplateError, generate

if __name__ == '__main__':
    try:
        for path, text in generate(ROOT).items():
            if not path.exists() or path.read_text(encoding='utf-8') != text:
                path.write_text(text, encoding='utf-8')
                print(f'written: {path.relative_to(ROOT)}')
    except TemplateError as e:
        sys.exit(f'error: {e}')

"""Documents with measured numbers, made from ``docs/results/*.csv`` and ``docs/templates/*.md``.

    python -m tests.docs

writes every generated page and block anew. A CSV file has one measurement a row, with what is known about it: data,
seeds, hardware, command, commit. A template is Markdown with

- ``{FILE:ROW:COLUMN}``, a single cell of ``docs/results/FILE.csv``;
- a table, one table row for each CSV row whose name fits a pattern, and one line for each table column::

    <!-- table: heads:frozen/cifar10/*
    head: `{what}`
    test top-1: {mean}[ ± {spread}]
    the same on MNIST: {heads:frozen/mnist/*:mean}
    -->

  ``{COLUMN}`` is a cell of the CSV row; in ``{FILE:ROW:COLUMN}`` a ``*`` stands for what the pattern's ``*`` stands
  for. A part in brackets is left out where one of its cells is empty; of ``[A|B]`` the first stays that has all cells.
  The facts of the rows follow by themselves: under the table where they are the same for all, as further columns or
  as numbered notes where not. A line ``facts: data, seeds`` chooses among them.

A template that begins with a heading is a page: ``docs/templates/results.md`` becomes ``docs/results.md``. Any other is
a block: it replaces what stands between ``<!-- begin: NAME -->`` and ``<!-- end -->`` in the README, the pages of
``docs`` and the configs, where each of these lines, and so each line of the block, may be a comment that starts with
``#``.
"""

"""The benchmark suite: paramtree beside every peer that can do the same, as ratios within one run.

Run all of it with ``make bench``, one case with ``python -m benchmarks.suite --only flatten``, and see
that everything runs with ``make bench-smoke``. It writes ``benchmarks/results.json`` (every number),
``benchmarks/RESULTS.md`` (the tables) and ``benchmarks/plots``.

How it measures
  Machines drift, so a time alone says little. In every round each contender of a case runs in a new
  process. All processes of a round first set up and warm up, and then take turns: a few milliseconds
  of one, of the next, and so on, the order rotated from turn to turn and from round to round. What
  else runs on a machine only ever adds time, so the least that was seen is what a call takes (as the
  documentation of ``timeit`` advises), and a ratio is that of the least times. What is reported is the
  least of all rounds, with the smallest and the largest round. What is no time (memory, a ratio) is
  reported by its median.

How to add a case
  Put a file into ``benchmarks/suite/cases`` which defines ``CASES``, a list of ``Case``. The import of
  that file must be light: import jax, paramtree and the peers inside the functions only. ::

      from benchmarks.suite.case import Bound, Case

      def ours(size):
          import jax
          import paramtree as pt
          tree = pt.from_tree(...)
          return {"flatten": lambda: jax.tree.flatten(tree)}

      def by_hand(size):
          ...
          return {"flatten": lambda: jax.tree.flatten(nested)}

      CASES = [
          Case(
              name="flatten",
              title="Flattening a tree",
              sizes=(20, 2000),
              contenders={"paramtree": ours, "dict": by_hand},
              bounds=(Bound("flatten", "dict", 0.4, when=lambda size: size >= 200),),
              smoke=(20,),
              packages=("flax",),
          )
      ]

  A contender is a function of a size that sets up and returns ``{metric: what}``, where ``what`` is

  * a function: it is called again and again and timed; it must block until its result is there;
  * ``Timed(call, before=...)``: ``before()`` is called without being timed before each ``call(made)``;
  * ``Measured(call)``: ``call()`` returns the value itself, at every turn;
  * a number: what the set-up itself has measured (a cold start, a peak of memory). A case of which
    that is all should say ``alone=True``: its processes then run one after the other, one turn each.

  A contender may return fewer metrics than others. One whose package is absent is left out, and so is
  one that raises ``Absent("why")``; both are said in the tables. Any other exception is an error: the
  suite goes on, shows it and ends with status 1.

  A ``Bound`` names a metric, the reference (a contender, a tuple of contenders of which the best
  counts in each round, or None for a limit in the case's unit) and the limit. ``ours`` is the
  contender that it holds for, ``when`` the sizes. With ``base=24`` the reference is taken at that size
  instead, which bounds growth. ``note`` of a case is text for its section of the tables: what the
  contenders do, and where a bound is not met, the floor.

  Try a contender by itself with ``python -m benchmarks.suite.worker CASE SIZE CONTENDER``: it prints
  one line of JSON. ``cached=True`` lets processes reuse what XLA compiled in an earlier round, for
  cases that do not measure compilation. ``seconds`` is what a case may take: no new round begins
  after that, but two rounds are always taken.
"""

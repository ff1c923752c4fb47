"""The benchmark suite: paramtree against every peer with the same feature, as ratios within one run.

Run it with ``make bench``, one case with ``python -m benchmarks.suite --only flatten``, and check that
everything runs with ``make bench-smoke``. It writes ``benchmarks/results.json`` (all numbers),
``benchmarks/RESULTS.md`` (the tables) and ``benchmarks/plots``.

How it measures
  Machine speed drifts, so absolute times say little. In each round, every contender of a case runs in a
  new process. The processes set up and warm up, then take turns of a few milliseconds; the order
  rotates from turn to turn and from round to round. Other load only adds time, so the minimum is the
  best estimate (as the documentation of ``timeit`` advises), and a ratio is a ratio of minima. Times
  are reported as the minimum of all rounds, other values (memory, ratios) as the median, each with the
  smallest and the largest round.

How to add a case
  Add a file to ``benchmarks/suite/cases`` that defines ``CASES``, a list of ``Case``. Keep its import
  light: import jax, paramtree and the peers only inside functions. ::

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

  A contender is a function of a size that sets up and returns ``{metric: work}``, where ``work`` is

  * a function, called repeatedly and timed; it must block until its result is ready;
  * ``Timed(call, before=...)``: ``call(before())``, where only ``call`` is timed;
  * ``Measured(call)``: ``call()`` returns the value at each turn;
  * a number that the set-up measured (a cold start, a memory peak). A case with only such metrics
    should set ``alone=True``: its processes run one after the other, one turn each.

  A contender may return fewer metrics than others. A contender whose package is not installed, or that
  raises ``Absent("why")``, is left out, and the tables say so. Any other exception is an error: the
  suite continues, shows it and exits with status 1.

  A ``Bound`` names a metric, a reference (a contender, a tuple of contenders whose best counts in each
  round, or None for a limit in the case's unit) and a limit. ``ours`` is the contender it applies to,
  ``when`` selects the sizes. ``base=24`` takes the reference at that size, which bounds growth. A
  case's ``note`` is text for its section of the tables: what the contenders do, and the floor where a
  bound is not met.

  Run one contender with ``python -m benchmarks.suite.worker CASE SIZE CONTENDER``: it prints one line
  of JSON. ``cached=True`` lets processes reuse XLA's compilation cache from earlier rounds, for cases
  that do not measure compilation. ``seconds`` is the time budget of a case: no round starts after it,
  except that there are always two.
"""

"""Our time beside its ceilings and its peers', taken in one run; docs/bench.md says how.

``shapes`` says what is timed, ``stopwatch`` how, ``ceilings`` and ``peers`` beside what; ``speed``
and ``pairs`` are the runs, ``report`` and ``compare`` what is made of them.  Nothing here prints.
"""

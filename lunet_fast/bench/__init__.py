"""Benchmarks that run without the repository: ``lunet-fast bench``.

A suite (``layers``, ``claims``, ``stacks``, ``training``) lists contests, ways to one end at one size.
``contest.py`` says what a contest is and times it, ``machine.py`` what the machine does at best,
``contenders.py`` and the suites who takes part, ``results.py`` how a run is kept, read and shown.
``quality.py`` is no suite: whole trainings, and how long they take to a test error.
"""

"""Tables, figures and reports made from results. Nothing here trains.

``run``: the table of a single training. ``reproduce``: the experiments, and the report on them.
``reproduction``: what it says of ``results``, with a head (``summary``), tables of trainings (``tables``) and
of committed files (``quoted``). ``document``: its parts. ``render``: as a page and as Markdown. ``chart``:
figures. ``templates``: what is said, and how each part looks.
"""

from lunet_fast.recsys.report.run import TABLE_2, table_2

__all__ = ["TABLE_2", "table_2"]

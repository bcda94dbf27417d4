"""Tables, figures and reports made from results. Nothing here trains.

``run``: the table of a single training. ``reproduction``: what the report on all experiments
says. ``document``: the parts of a report, and as Markdown. ``html``: as a page. ``chart``: its pictures.
"""

from lunet_fast.recsys.report.run import TABLE_2, table_2

__all__ = ["TABLE_2", "table_2"]

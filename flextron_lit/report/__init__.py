"""The page that a pipeline ends with: trade-off, widths, texts and origin of a network, all in one file.

What the report shows, and where that is decided, in the order in which it is made:

```
reported_folder.py      what it is about: the finished stages of a pipeline, one run, or a checkpoint alone
points.py               networks and how good they are: what the stages validated last
point_costs.py          what those cost
findings.py             all that a checkpoint and its run say: cost tables, routers, points, notes for the reader
evaluated_networks.py   what `evaluate` found: more points, and tables
generated_texts.py      what the network writes within several budgets
origin.py               commands, machines, stages and training text
charts.py, *.vl.json    the charts, as Vega-Lite specifications
page_data.py            what charts draw and scripts can read: the JSON in the page
page.py                 what the page says, and in which order: the values of the template
report.html, .css, .js  how it says that; document.html is what all pages have, rendering.py fills templates in
assembly.py             the whole of it for a command: read, generate, write the file
```

Beside it: `summary.py`, the table that a pipeline prints, and `spending/`, a text shaded by what a dynamic router gives
to each token.
"""

"""One page of HTML from measurements: what they say, as tables and charts, and where they are kept.

entries   reads results and ledgers, whatever wrote them; collect: those beside checkpoints;
          naming: what their models are called
summary   one row per model
charts    curves, dots, histograms and heat maps as SVG that follows the page's colours
quality   tables and charts about what models say; speed: about how fast they run
page      the page itself, from page.html
"""

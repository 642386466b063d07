"""Measurements that are kept, as one page of HTML, as a table of models, and in a model's card.

entries   reads results and ledgers, whatever wrote them; collect: those beside checkpoints, and
          what their models are called
summary   one row per model
charts    curves, dots, histograms and heat maps as SVG that follows the page's colours
quality   tables and charts about what models say; details: about single probes;
          speed_sections: about how fast models run
page      the page itself, from page.html
"""

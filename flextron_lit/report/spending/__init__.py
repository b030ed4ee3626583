"""Where a dynamic router's compute goes: token by token, by class of token, as pages and figures.

```
shown_texts.py          which texts are shown
token_pieces.py         their tokens as text again, without cutting a character in two
token_classes.py        word, number, punctuation: what kind of token a piece is
routed_text.py          what every token got: cost, widths, losses
token_groups.py         means by class of token, and by how hard the next token is to predict
shades.py               which cost has which colour
page.py, compute.html   a shaded text as a web page; compute.css is its style
plots.py                the same as figures, and widths by domain
```
"""

"""What a thief gets from a run: an audit that replays it and attacks the model with what was sent.

`case` is what is audited, `replay` and `received` what colluding clients were sent, `rows` what
they own. Each attack is a file of pure functions: `alone`, `union`, `hidden_columns`,
`distillation`, `quantization_cells`, `low_rank_differences`, `subtraction`, `membership`. `playing`
plays all of them, `intervals` tells how sure the figures are, `report`, `picture` and `page` show
them. See README.md in this folder.
"""

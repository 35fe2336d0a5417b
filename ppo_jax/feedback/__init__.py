"""What people prefer: a store of items and judgements, the page that asks, files in and out, agreement (floor 4).

`store` holds everything (its records are in `items`, the SQLite file under it in `database`), `page` asks people,
`simulated` asks a known preference, `formats` writes and reads files, `agreement` tells how far annotators agree. The
page alone needs the `feedback` extra.
"""

"""From files to the rows a model reads, in the order it happens:

sources/     a sample: messages in OpenAI form with references to pictures   (sample.py)
chat.py      tokens, targets and positions; pictures by their headers only
packing.py   the run's one sequence of rows: order, virtual shards, first-fit
rows.py      pixels decoded (images.py, videos.py), rows laid out, batches
loader.py    which rank and worker makes which row; stop anywhere, resume anywhere
"""

"""Many items answered by one bundle: folders and tables of images, a journal that survives `kill -9`, and its output.

`inputs.read_items` gives what is asked, `run.answers` asks it, `journal.open_journal` keeps what is finished.
"""

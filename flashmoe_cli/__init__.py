"""The command line of flashmoe: one file a verb in ``commands``, all drawing in ``render``.

Nothing here is imported by ``flashmoe``; imports that cost time (torch, numpy, pyarrow) stand
inside the commands, so that ``flashmoe --help`` is quick.
"""

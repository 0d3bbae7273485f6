"""Images: their records and catalogue, the registry client, pull and push, archives.

Import the submodule that is needed; `records` and `catalog` are on the path of every start.
"""

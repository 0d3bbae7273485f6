"""Types of the OCI image and distribution specifications, and references as Docker writes them.

Pure: parsing, checking and choosing; import the submodule that is needed (`reference` is
on the path of every start and stays light).
"""

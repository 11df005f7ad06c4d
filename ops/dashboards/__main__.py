"""``python -m ops.dashboards``: write the dashboards' files, and say which have changed."""

from ops.dashboards.files import write

for path in write():
    print(path)

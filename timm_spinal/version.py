__version__ = '0.1.0'
ADDRESS = ''  # what `pip install` takes to install this package; '' while it is in no index

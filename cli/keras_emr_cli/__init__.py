"""The ``keras-emr`` command line. Nothing here imports keras before a command needs it."""

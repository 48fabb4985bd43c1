"""Names of metrics that are of one data set of several: `valid_nll/general`."""


def metric_of_set(metric: str, name: str) -> str:
    """What a metric is called that is of the set `name` alone, be it of training or evaluation."""
    return f"{metric}/{name}" if name else metric


def split_name(name: str) -> tuple[str, str]:
    """The reverse: the metric as the table has it, and the set, which is empty where the metric is of no named one."""
    metric, _, of_set = name.partition("/")
    return metric, of_set

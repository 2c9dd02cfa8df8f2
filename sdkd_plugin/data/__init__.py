"""What is forecast: turbulence, computed or from files, and traffic, read or simulated."""

from sdkd_plugin.data.navier_stokes import navier_stokes
from sdkd_plugin.data.traffic import find_traffic, read_csv_pair, read_los_loop
from sdkd_plugin.data.traffic_data import TrafficData
from sdkd_plugin.data.traffic_simulator import simulate_traffic
from sdkd_plugin.data.trajectories import read_trajectories

__all__ = [
    "TrafficData",
    "find_traffic",
    "navier_stokes",
    "read_csv_pair",
    "read_los_loop",
    "read_trajectories",
    "simulate_traffic",
]

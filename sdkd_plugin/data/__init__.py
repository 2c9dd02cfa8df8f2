"""What is forecast: flows, computed or read; traffic, read or simulated; taxis; weather."""

from sdkd_plugin.data.apebench import apebench_trajectories
from sdkd_plugin.data.mixing import MixedSampler, MixedSamples, mix, windows_apart
from sdkd_plugin.data.navier_stokes import navier_stokes
from sdkd_plugin.data.rayleigh_benard import rayleigh_benard
from sdkd_plugin.data.sensors import TrafficData
from sdkd_plugin.data.symmetry import Symmetry, navier_stokes_symmetry
from sdkd_plugin.data.taxibj import TaxiFlows, read_taxibj
from sdkd_plugin.data.traffic import find_traffic, read_csv_pair, read_los_loop
from sdkd_plugin.data.traffic_simulator import simulate_traffic
from sdkd_plugin.data.trajectories import read_trajectories
from sdkd_plugin.data.weatherbench import WeatherData, latitude_weighted_rmse, read_weatherbench

__all__ = [
    "MixedSampler",
    "MixedSamples",
    "Symmetry",
    "TaxiFlows",
    "TrafficData",
    "WeatherData",
    "apebench_trajectories",
    "find_traffic",
    "latitude_weighted_rmse",
    "mix",
    "navier_stokes",
    "navier_stokes_symmetry",
    "rayleigh_benard",
    "read_csv_pair",
    "read_los_loop",
    "read_taxibj",
    "read_trajectories",
    "read_weatherbench",
    "simulate_traffic",
    "windows_apart",
]

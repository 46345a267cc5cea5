"""`/api/admin/devices`: MQTT devices, for those whose role allows it."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from app.dependencies import CurrentUser, DevicesDep
from app.hardening import StrictRoute
from app.routers.times import moment
from app.services.devices import Device as StoredDevice

router = APIRouter(prefix="/api/admin/devices", tags=["admin"], route_class=StrictRoute)


class NewDevice(BaseModel):
    """A device to add; `name` will be its user name at the broker. It is mine, or that of the username
    `owner`."""

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]
    projects: Annotated[list[Annotated[str, Field(max_length=64)]], Field(min_length=1, max_length=100)]
    owner: Annotated[str | None, Field(max_length=64)] = None


class Device(BaseModel):
    """A device. `owner` is the username of the account that its sessions belong to. `at_broker` is false
    while it cannot sign in at the broker, until it has a new password; null where nobody can be asked."""

    id: str
    name: str
    owner: str
    projects: list[str]
    created_at: datetime
    at_broker: bool | None

    @classmethod
    def of(cls, device: StoredDevice) -> Device:
        """The body of a device."""
        return cls(
            id=device.id,
            name=device.name,
            owner=device.username,
            projects=list(device.projects),
            created_at=moment(device.created_at),
            at_broker=device.at_broker,
        )


class AddedDevice(Device):
    """A device that was added just now. `password` is shown this once: only the broker knows it. It is null
    where somebody else than the portal keeps to the rules, and gives the passwords."""

    password: str | None


class DeviceList(BaseModel):
    """Devices by name, the projects that a device can be in, and who keeps devices to their own topics
    (`MQTT_ACL`): with `none`, none can be added."""

    devices: list[Device]
    projects: list[str]
    acl: Literal["none", "mosquitto", "external"]


class DevicePassword(BaseModel):
    """A password that was made just now. It is shown this once."""

    password: str


@router.get("")
async def list_devices(user: CurrentUser, devices: DevicesDep) -> DeviceList:
    """The devices that there are."""
    found = await devices.all(user)
    return DeviceList(
        devices=[Device.of(device) for device in found], projects=list(devices.projects), acl=devices.keeper
    )


@router.post("", status_code=201)
async def add_device(body: NewDevice, user: CurrentUser, devices: DevicesDep) -> AddedDevice:
    """Adds a device. Its password is in this answer and nowhere else but at the broker."""
    device, password = await devices.add(user, body.name, body.projects, body.owner)
    return AddedDevice(**Device.of(device).model_dump(), password=password)


@router.delete("/{name}", status_code=204)
async def remove_device(name: str, user: CurrentUser, devices: DevicesDep) -> None:
    """Takes a device's rights away and ends its connections, at once. Its sessions stay with its owner."""
    await devices.remove(user, name)


@router.post("/{name}/password", status_code=201)
async def make_device_password(name: str, user: CurrentUser, devices: DevicesDep) -> DevicePassword:
    """Gives a device another password, and ends its connections with the old one."""
    return DevicePassword(password=await devices.new_password(user, name))

import { useMutation, useQuery, useQueryClient } from "@tanstack/react-query";
import { body, http } from "../client/http";
import type { NewDevice } from "../client/schema";

const DEVICES = ["devices"] as const;

export function useDevices() {
  return useQuery({
    queryKey: DEVICES,
    queryFn: () => body(http.GET("/api/admin/devices")),
  });
}

function useDeviceMutation<T, R>(mutationFn: (variables: T) => Promise<R>) {
  const queries = useQueryClient();
  return useMutation({ mutationFn, onSuccess: () => queries.invalidateQueries({ queryKey: DEVICES }) });
}

export function useAddDevice() {
  return useDeviceMutation((device: NewDevice) => body(http.POST("/api/admin/devices", { body: device })));
}

export function useRemoveDevice() {
  return useDeviceMutation((name: string) =>
    body(http.DELETE("/api/admin/devices/{name}", { params: { path: { name } } })),
  );
}

export function useDevicePassword() {
  return useDeviceMutation((name: string) =>
    body(http.POST("/api/admin/devices/{name}/password", { params: { path: { name } } })),
  );
}

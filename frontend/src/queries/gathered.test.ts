import { afterEach, beforeEach, expect, it, vi } from "vitest";
import { gathered } from "./gathered";

beforeEach(() => {
  vi.useFakeTimers();
});
afterEach(() => {
  vi.useRealTimers();
});

it("hands items on at once, and then in turn", async () => {
  const handled: string[][] = [];
  const add = gathered<string>(1000, async (items) => handled.push([...items]));
  add("a");
  add("b");
  add("b");
  expect(handled).toEqual([["a"]]);
  await vi.advanceTimersByTimeAsync(1000);
  expect(handled).toEqual([["a"], ["b"]]);
  await vi.advanceTimersByTimeAsync(5000);
  add("c");
  expect(handled).toEqual([["a"], ["b"], ["c"]]);
});

it("lets slow handling come to its end under a steady flow", async () => {
  const done: number[] = [];
  const add = gathered<number>(1000, async (items) => {
    await new Promise((resolve) => setTimeout(resolve, 2500));
    done.push(items.size);
  });
  for (let item = 0; item < 200; item += 1) {
    add(item);
    await vi.advanceTimersByTimeAsync(40);
  }
  expect(done).toHaveLength(3);
});

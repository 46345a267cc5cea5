import type { ErrorBody, ErrorInfo } from "./schema";

/** A failure, in the vocabulary of the portal's errors. `code` is `unreachable` where no answer came. */
export class PortalError extends Error {
  override readonly name = "PortalError";

  constructor(
    readonly code: string,
    message: string,
    readonly options: { status?: number; retryable?: boolean; retryAfter?: number } = {},
  ) {
    super(message);
  }

  /** The error of an HTTP answer that was no success. */
  static async of(response: Response): Promise<PortalError> {
    return PortalError.ofBody(await response.json().catch(() => undefined), response);
  }

  /** The same, where the body was read already. */
  static ofBody(body: unknown, { status, headers }: Response): PortalError {
    const retryAfter = Number(headers.get("retry-after")) || undefined;
    const options = {
      status,
      retryable: status === 429 || status >= 500,
      ...(retryAfter === undefined ? {} : { retryAfter }),
    };
    const error = (body as Partial<ErrorBody> | undefined)?.error;
    return error === undefined
      ? new PortalError("internal", `The portal answered with status ${status}.`, options)
      : new PortalError(error.code, error.message, options);
  }

  /** The error that ended a turn. */
  static ofTurn(info: ErrorInfo): PortalError {
    return new PortalError(info.code, info.message, { retryable: info.retryable });
  }

  /** Any thrown value as an error that can be shown. */
  static from(thrown: unknown): PortalError {
    if (thrown instanceof PortalError) return thrown;
    if (thrown instanceof TypeError) {
      return new PortalError("unreachable", "The portal cannot be reached.", { retryable: true });
    }
    return new PortalError("internal", thrown instanceof Error ? thrown.message : String(thrown));
  }
}

const ADVICE: Record<string, string> = {
  unreachable: "Look at your network, or ask whether the portal runs; then try again.",
  overloaded: "Wait a moment and try again.",
  llm_unavailable: "Ask whoever runs the portal to look at the model server, or try again in a minute.",
  llm_timeout: "The model is slow or busy. Try again, or ask for a shorter answer.",
  llm_error: "Try again; if it stays, whoever runs the portal can look at the model server's log.",
  internal: "Try again; if it stays, the portal's log of this moment tells more.",
};

/** What a person can do about an error; nothing where its message says it already. */
export function adviceFor(error: PortalError): string | undefined {
  return ADVICE[error.code];
}

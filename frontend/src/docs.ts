// The API's page, which is apart from the portal's own: few need it, and it is heavy.
import "swagger-ui-dist/swagger-ui.css";
import SwaggerUI from "swagger-ui-dist/swagger-ui-es-bundle.js";

SwaggerUI({ url: "/openapi.json", dom_id: "#root", deepLinking: true, tryItOutEnabled: true });
